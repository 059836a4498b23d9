"""Checking a loaded model against its own attention, so that a wrong result is refused when it is loaded.

Two small packed rows are run with the plan and with the model's own (`eager`) attention: a tree of a prompt, two
siblings and a join; and a line under the masks that the model makes for itself. Windows are thousands of tokens wide in
real models, so for the line they are narrowed to a few tokens, in the configuration, which masks are made from, and in
what attention is asked for: both must agree in every layer on who is windowed, and by how much.

Outputs are compared in each layer for the same queries, keys and values, so rounding does not add up over layers and
the tolerance can be tight in bfloat16 too; then the logits of the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestra.errors import EngineError
from orchestra.runtime.attention.plan import Chunk, Plan, Shared, Write
from orchestra.runtime.local.interface import current_plan, running, segment_attention

if TYPE_CHECKING:
    from orchestra.runtime.local.model import LoadedModel

OWN = "orchestra_own"
"""Name of the model's own attention, compared with ours on the way."""

OUTPUT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Largest difference of an attention output, relative to the largest output."""

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.3}
"""Length of the difference of all logits, relative to theirs: rounding has added up here, and may have sent
tokens to other experts."""

NARROW = 4
"""What windows become."""


class _Node(NamedTuple):
    """Tokens of a node, the position of the first, and the nodes that it sees besides itself."""

    tokens: int
    start: int
    parents: tuple[int, ...]


TREE = (_Node(4, 0, ()), _Node(3, 4, (0,)), _Node(2, 4, (0,)), _Node(3, 7, (0, 1, 2)))
LINE = (_Node(7, 0, ()), _Node(5, 7, (0,)))
ROWS = 12


class _Check(Plan):
    """A plan that narrows windows, or takes them away.

    Attributes:
        narrow: what windows become; None for none at all.
        windows: those asked for.
        worst: largest difference of an output from the model's own, in tolerances.
    """

    def __init__(self, narrow: int | None) -> None:
        super().__init__(ROWS)
        self.narrow = narrow
        self.windows: set[int] = set()
        self.worst = 0.0

    def run(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        if window is not None:
            self.windows.add(window)
            window = self.narrow
        return Plan.run(self, layer, query, key, value, scale, window=window, softcap=softcap)


def own_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Any]:
    """The model's own attention, in float32; how far ours is from it is noted in the running plan."""
    eager = sys.modules[type(module).__module__].eager_attention_forward
    mask = None if attention_mask is None else attention_mask.float()
    theirs, weights = eager(module, query.float(), key.float(), value.float(), mask, **options)
    ours, _ = segment_attention(module, query, key, value, None, **options)
    off = (ours.float() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    plan = current_plan()
    assert isinstance(plan, _Check)
    plan.worst = max(plan.worst, float(off.nan_to_num(torch.inf)) / OUTPUT_TOLERANCE[query.dtype])
    return theirs.to(query.dtype), weights


ALL_ATTENTION_FUNCTIONS.register(OWN, own_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(OWN, eager_mask)


@torch.inference_mode()
def probe(model: LoadedModel) -> bool:
    """Compare a model on the plan with itself.

    Returns:
        Whether some of its layers have windows.

    Raises:
        EngineError: the plan does not give what the model's own attention gives.
    """
    keys, values = (model.memory.allocate(model.memory.heads, ROWS) for _ in range(2))
    try:
        plan, positions, mask = _pack(TREE, keys, values, None)
        _compare(model, plan, positions, mask)
        windows = plan.windows
        configured = model.module.config.get_text_config().__dict__.get("sliding_window")
        if windows - {configured}:
            raise EngineError(f"its layers ask for windows of {windows}, its configuration says {configured}")
        plan, positions, _ = _pack(LINE, keys, values, NARROW)
        with _set(model.module, "sliding_window", NARROW):
            _compare(model, plan, positions, None)
    finally:
        model.memory.free(keys, values)
    return bool(windows)


@torch.inference_mode()
def probe_streams(model: LoadedModel) -> None:
    """Compare a model that has streams with the dense forward of each stream, its prefix in transformers' cache.

    Raises:
        EngineError: the plan does not give the logits that they give.
    """
    streams, memory, module = model.streams, model.memory, model.module
    assert streams is not None
    keys, values = (memory.allocate(memory.heads, ROWS) for _ in range(2))
    try:
        plan, positions, seen = _pack(TREE, keys, values, None)
        plan.streams, plan.prefix = memory.streams, memory.prefix
        tokens = torch.arange(ROWS, device=memory.device) * (module.config.get_text_config().vocab_size // ROWS)
        cache = DynamicCache()
        for layer, (of_keys, of_values) in enumerate(zip(streams.keys, streams.values, strict=True)):
            cache.update(of_keys, of_values, layer)
        seen = torch.cat([seen.new_ones(ROWS, streams.prefix), seen], 1)
        mask = torch.zeros(seen.shape, dtype=memory.dtype, device=seen.device)
        mask = mask.masked_fill_(~seen, torch.finfo(memory.dtype).min)[None, None]
        with (
            running(None, lambda hidden: streams.aggregate(hidden).unsqueeze(0)),
            _set(module, "_attn_implementation", "eager"),
        ):
            dense = module(
                input_ids=tokens.expand(memory.streams, -1),
                position_ids=positions.expand(memory.streams, -1),
                attention_mask=mask.expand(memory.streams, -1, -1, -1),
                past_key_values=cache,
                use_cache=False,
            )
        ours = model.forward(tokens, positions, np.arange(1, ROWS), plan).float()
    finally:
        memory.free(keys, values)
    theirs = dense.logits[0, 1:].float()
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not off <= LOGIT_TOLERANCE[memory.dtype]:
        raise EngineError(f"the logits on the plan are not those of a dense forward (off by {off:.1%})")


def _pack(nodes: tuple[_Node, ...], keys: Tensor, values: Tensor, narrow: int | None) -> tuple[_Check, Tensor, Tensor]:
    """The plan of a packed row, its positions `[rows]`, and the same as a dense mask `[rows, rows]` of who is seen."""
    device = keys.device
    plan = _Check(narrow)
    stops = list(accumulate(node.tokens for node in nodes))
    spans = [(stop - node.tokens, stop) for node, stop in zip(nodes, stops, strict=True)]
    seen = torch.zeros(ROWS, ROWS, dtype=torch.bool, device=device)
    for node, (a, b) in zip(nodes, spans, strict=True):
        own = keys[:, :, a:b], values[:, :, a:b]
        plan.writes.append(Write(a, b, *own))
        plan.chunks.append(Chunk.over(a, b, *own))
        seen[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool, device=device).tril()
        for parent in node.parents:
            c, d = spans[parent]
            stretch = ((nodes[parent].start, d - c),)
            rows = torch.arange(a, b, device=device)
            plan.shared.append(Shared(rows, keys[:, :, c:d], values[:, :, c:d], stretch))
            seen[a:b, c:d] = True
    plan.positions = torch.cat([torch.arange(node.start, node.start + node.tokens) for node in nodes]).to(device)
    return plan, plan.positions, seen


def _compare(model: LoadedModel, plan: _Check, positions: Tensor, seen: Tensor | None) -> None:
    module, dtype = model.module, model.memory.dtype
    tokens = torch.arange(ROWS, device=positions.device) * (module.config.get_text_config().vocab_size // ROWS)
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        mask = mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
    with running(plan), _set(module, "_attn_implementation", OWN):
        theirs = module(
            input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), attention_mask=mask, use_cache=False
        ).logits[0]
    if not plan.worst <= 1:
        raise EngineError("what its layers attend to is not what the plan gives them (it has more to its attention)")
    keep = np.arange(1, ROWS)
    ours = model.forward(tokens, positions, keep, plan).float()
    theirs = theirs[1:].float()
    if not bool(torch.isfinite(theirs).all()):
        raise EngineError(f"its logits are not finite in {str(dtype).removeprefix('torch.')}")
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if not off <= LOGIT_TOLERANCE[dtype]:
        raise EngineError(f"its logits on the plan are not its own (off by {off:.1%})")


@contextmanager
def _set(module: Any, name: str, value: Any) -> Iterator[None]:
    """Change a setting, where there is one, in all configurations of a model's parts; and change it back."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    before = [(config, getattr(config, name)) for config in configs.values() if getattr(config, name, None) is not None]
    try:
        for config, _ in before:
            setattr(config, name, value)
        yield
    finally:
        for config, old in before:
            setattr(config, name, old)
