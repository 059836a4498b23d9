"""How a loaded model rotates queries and keys, so that a query can be read at another position than its own.

Rotary positions are relative: a query rotated for position p becomes the one for p + d when it is rotated by d more.
Nothing is known here of architectures: what a model does is found out by giving it the same tokens at two positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orchestra.runtime.attention.plan import Plan

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error of a turned vector relative to the model's own, in length. Models round cos and sin to their type."""

ANGLE_ERROR = 2.0**-22
"""What that grows by per position: angles are float32 products."""

_SHIFTS = (1, 2, 3, 7, 17, 40, 97)


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """How one layer rotates.

    Attributes:
        frequencies: radians per position of each pair of dimensions, float32 `[width / 2]`.
        interleaved: pairs are neighbours (2i, 2i + 1), as in Cohere and GLM; else they are (i, i + width / 2).
    """

    frequencies: Tensor
    interleaved: bool

    @property
    def width(self) -> int:
        """Leading dimensions of a head that rotate; those behind them carry no position."""
        return 2 * len(self.frequencies)

    def turn(self, x: Tensor, delta: Tensor) -> Tensor:
        """See `Rotary.turn`."""
        angle = (delta.unsqueeze(-1).float() * self.frequencies).unsqueeze(-2)
        cos, sin = angle.cos(), angle.sin()
        moving, still = x[..., : self.width].float(), x[..., self.width :]
        if self.interleaved:
            a, b = moving[..., ::2], moving[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = moving.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        return torch.cat((turned.to(x.dtype), still), -1)


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """The rotations of a model.

    Attributes:
        layers: one for each layer; None for layers without positions (NoPE).
    """

    layers: tuple[Rotation | None, ...]

    def turn(self, x: Tensor, delta: Tensor, layer: int) -> Tensor:
        """Move rotated queries or keys by a number of positions.

        A pure rotation: a factor on rotated vectors (YaRN's attention scaling) is in `x` already, and stays.

        Args:
            x: `[..., heads, dim]`, rotated for some position.
            delta: how much further on, may be negative; int64 `[...]`.
            layer: index of the layer.

        Returns:
            `x` as the model would have rotated it for that position plus `delta`; computed in float32, in the type of
            `x`.
        """
        rotation = self.layers[layer]
        return x if rotation is None else rotation.turn(x, delta)


class _Capture(Plan):
    """Keeps what attention is asked, and lets every token see itself only: so no token knows its own position."""

    def __init__(self, rows: int) -> None:
        super().__init__(rows)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor:
        self.seen[layer] = query, key
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@torch.inference_mode()
def find_rotary(module: Any, layers: int) -> Rotary | None:
    """Learn, and so verify, how a model rotates: one forward of a few tokens, each at two positions.

    Args:
        module: a causal model that runs on our attention function.
        layers: how many it has.

    Returns:
        None if some layer does anything else with positions than to rotate by a difference.
    """
    device = next(module.parameters()).device
    config = module.config.get_text_config()
    n = len(_SHIFTS) + 1
    tokens = torch.arange(n, device=device) * (config.vocab_size // n)
    first = torch.arange(n, device=device)
    furthest = max(1, config.max_position_embeddings - n)  # some models scale queries from some position on
    delta = torch.tensor((*_SHIFTS, furthest), device=device).clamp(max=furthest)
    capture = _Capture(2 * n)
    module(
        input_ids=tokens.repeat(2).unsqueeze(0),
        position_ids=torch.cat((first, first + delta)).unsqueeze(0),
        use_cache=False,
        logits_to_keep=1,
        orchestra_plan=capture,
    )
    candidates: list[Rotation | None] = [None]
    for frequencies in _frequencies(module):
        for turns in (frequencies, -frequencies):  # a few models turn the other way round
            candidates += [Rotation(turns, False), Rotation(turns, True)]
    found: list[Rotation | None] = []
    for layer in range(layers):
        if layer not in capture.seen:
            return None
        error, _, best = min(
            (max(_error(candidate, x, delta) for x in capture.seen[layer]), i, candidate)
            for i, candidate in enumerate(candidates)
        )
        if not error <= 1:
            return None
        found.append(best)
    return Rotary(tuple(found))


def _frequencies(module: Any) -> list[Tensor]:
    """The different sets of inverse frequencies that a model holds."""
    found: list[Tensor] = []
    for name, buffer in module.named_buffers():
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq"):
            frequencies = buffer.detach().float().clone()
            if not any(torch.equal(frequencies, known) for known in found):
                found.append(frequencies)
    return found


def _error(rotation: Rotation | None, x: Tensor, delta: Tensor) -> float:
    """Of the worst token and head, in tolerances. `x` `[2 * tokens, heads, dim]`: first as it is, then further on."""
    before, after = x.chunk(2)
    if rotation is not None and rotation.width > x.shape[-1]:
        return float("inf")
    turned = before if rotation is None else rotation.turn(before, delta)
    off = (turned.float() - after.float()).norm(dim=-1) / after.float().norm(dim=-1).clamp_min(1e-30)
    return float((off / (TOLERANCE[x.dtype] + ANGLE_ERROR * delta.unsqueeze(-1))).max())
