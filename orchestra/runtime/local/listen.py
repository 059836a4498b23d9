"""What a model asks of attention, learned from the model: one forward of a few tokens, each at two positions.

Every token sees itself only, so what a token asks depends on nothing but itself and its position. What differs between
the two positions is what the model does with positions; and what should not differ shows that it has more to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestra.errors import EngineError
from orchestra.runtime.attention.plan import Plan
from orchestra.runtime.local.interface import running

_FURTHER = (1, 2, 3, 7, 17, 40, 97)

SAME = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest relative difference, in length, of vectors that are the same but for rounding."""


class Terms(NamedTuple):
    """How a layer wants its scores made; see `Plan.run`."""

    scale: float
    window: int | None
    softcap: float | None


class Asked(NamedTuple):
    """Of one layer: `[2, tokens, heads, dim]`, the tokens at one position and then further on; and its terms."""

    query: Tensor
    key: Tensor
    value: Tensor
    terms: Terms


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What the layers asked.

    Attributes:
        layers: each layer's.
        by: how much further on each token's second position is, int64 `[tokens]`.
    """

    layers: tuple[Asked, ...]
    by: Tensor


class _Alone(Plan):
    """Keeps what attention is asked, and lets every token see itself only."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.asked: dict[int, Asked] = {}

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor:
        terms = Terms(scale, options.get("window"), options.get("softcap"))
        self.asked[layer] = Asked(query, key, value, terms)
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@torch.inference_mode()
def listen(module: Any) -> Heard:
    """Hear a model.

    Args:
        module: a causal model that runs on our attention function.

    Raises:
        EngineError: it has layers that do not ask, or each for keys of another shape, or in which tokens learn of each
            other by other ways than attention (convolutions, recurrences).
    """
    device = next(module.parameters()).device
    config = module.config.get_text_config()
    n = len(_FURTHER) + 1
    tokens = torch.arange(n, device=device) * (config.vocab_size // n)
    first = torch.arange(n, device=device)
    furthest = max(1, config.max_position_embeddings - n)  # some models scale queries from some position on
    by = torch.tensor((*_FURTHER, furthest), device=device).clamp(max=furthest)
    # Backwards the second time, so that each token has other neighbours.
    alone = _Alone(2 * n)
    with running(alone):
        module(
            input_ids=torch.cat((tokens, tokens.flip(0))).unsqueeze(0),
            position_ids=torch.cat((first, (first + by).flip(0))).unsqueeze(0),
            use_cache=False,
        )
    if sorted(alone.asked) != list(range(config.num_hidden_layers)):
        raise EngineError(f"attention ran in {len(alone.asked)} of {config.num_hidden_layers} layers")
    layers: list[Asked] = []
    for layer in range(config.num_hidden_layers):
        told = alone.asked[layer]
        query, key, value = (torch.stack((x[:n], x[n:].flip(0))) for x in (told.query, told.key, told.value))
        asked = Asked(query, key, value, told.terms)
        if asked.key.shape != asked.value.shape:
            raise EngineError("its keys and values differ in size")
        if layers and asked.key.shape != layers[0].key.shape:
            raise EngineError("its layers have keys of different sizes")
        if not float(difference(*asked.value).max()) <= SAME[asked.value.dtype]:
            raise EngineError("its tokens learn of each other, or of their position, by other ways than attention")
        layers.append(asked)
    return Heard(tuple(layers), by)


def difference(a: Tensor, b: Tensor) -> Tensor:
    """Length of the difference of vectors relative to the second, `[..., dim]` to `[...]`; nan is infinite."""
    off = (a.float() - b.float()).norm(dim=-1) / b.float().norm(dim=-1).clamp_min(1e-30)
    return torch.nan_to_num(off, torch.inf)
