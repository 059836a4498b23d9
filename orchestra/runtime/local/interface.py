"""Our side of the transformers attention interface: unchanged models call `segment_attention` in every layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestra.errors import EngineError
from orchestra.runtime.attention.plan import Plan

ATTENTION = "orchestra_segments"
"""Name of our function in the transformers attention interface."""

# What an attention call may bring without changing its meaning here. Anything else that is set is refused by name.
_HARMLESS = frozenset(
    {"position_ids", "use_cache", "is_causal", "output_attentions", "output_router_logits", "cache_position"}
)

Mix = Callable[[Tensor], Tensor]
"""Hidden states of all streams after the final norm to those that the head gets."""

# Not an argument of the model's forward: some models do not hand those on to their layers.
_PLAN: ContextVar[Plan | None] = ContextVar("orchestra_plan", default=None)
_MIX: ContextVar[Mix | None] = ContextVar("orchestra_mix", default=None)


@contextmanager
def running(plan: Plan | None, mix: Mix | None = None) -> Iterator[None]:
    """Models that are called within run their attention over this plan; before the head of `mixing` comes `mix`."""
    tokens = _PLAN.set(plan), _MIX.set(mix)
    try:
        yield
    finally:
        _PLAN.reset(tokens[0])
        _MIX.reset(tokens[1])


def mixing(module: Any) -> None:
    """Let the head of a causal model take what `running` says to mix; once for all, from any thread."""

    def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        mix = _MIX.get()
        return inputs if mix is None else (mix(inputs[0]), *inputs[1:])

    module.get_output_embeddings().register_forward_pre_hook(before)


def current_plan() -> Plan:
    """The plan of `running`.

    Raises:
        EngineError: the model was called without one.
    """
    plan = _PLAN.get()
    if plan is None:
        raise EngineError("this model was loaded for the in-process engine; its attention needs a plan")
    return plan


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function: shapes `[1, heads, rows, dim]` in, `[1, rows, heads, dim]` out.

    `sliding_window` w: a query at position p sees the keys at positions above p - w. `softcap` c: scores become
    c * tanh(scores / c).
    """
    for name, given in options.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise EngineError(f"its {type(module).__name__} needs {name!r} in attention")
    if attention_mask is not None or dropout:
        brings = "dropout" if dropout else "a mask"
        raise EngineError(f"its {type(module).__name__} brings {brings}; the plan handles neither masks nor dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx
    query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
    out = current_plan().run(layer, query, key, value, scale, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, segment_attention)
