"""One parallel forward over a graph whose nodes read each other while they grow (Hogwild! Inference, arXiv:2504.06261).

In layer l keys and values come from the hidden states of layer l-1, so a forward over all tokens at once, each at its
own places in its own view, gives the numbers of the run that made them token by token. All tokens stand in one row at
position 0, where the model's own rotation is the identity (times YaRN's attention scaling, which belongs on queries and
keys once); what rotates them to their places is the attention function here, in float32.

`places` says everything: entry (i, j) is the place of token j in the view of token i, or -1 where i does not see j. The
diagonal is each token's own position. It needs gradients only for the model, so training can reuse it for all rows of
one layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestra.errors import UsageError
from orchestra.graph import Node, Read, ThreadGraph

ATTENTION = "orchestra_concurrent"
"""Name of the attention function in the transformers attention interface."""


@dataclass(slots=True)
class ConcurrentRow:
    """A graph as one row, in the order of its nodes.

    Attributes:
        tokens: ids.
        nodes: the node of each token.
        indices: its index in the node.
        weights: loss weight of predicting it: of its span for sampled tokens, else 0.
        predecessors: the entry whose logits predict it; None for the first token of a root, of a reuse join and of a
            concurrent node.
        places: `[tokens, tokens]`, int64; see the module.
    """

    tokens: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    predecessors: list[int | None] = field(default_factory=list)
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))


def concurrent_row(graph: ThreadGraph) -> ConcurrentRow:
    """The whole graph, ordinary nodes and concurrent ones, with the place of every token in every view.

    Raises:
        UsageError: a span counts tokens whose ids are not known, or a view names a node twice.
    """
    row, first = ConcurrentRow(), {}
    for node in graph.nodes:
        if len(node.tokens) != len(node):
            raise UsageError(f"node {node.id} has {len(node)} tokens but {len(node.tokens)} token ids")
        first[node.id] = len(row.tokens)
        row.tokens += node.tokens
        row.nodes += [node.id] * len(node)
        row.indices += range(len(node))
        row.weights += [s.weight if s.origin == "sampled" else 0.0 for s in node.spans for _ in range(s.count)]
        before = first[node.context[0].parent] + node.context[0].length - 1 if len(node.context) == 1 else None
        row.predecessors += [before, *range(first[node.id], first[node.id] + len(node) - 1)][: len(node)]
    size = len(row.tokens)
    row.places = torch.full((size, size), -1, dtype=torch.int64)
    for i, (node_id, index) in enumerate(zip(row.nodes, row.indices, strict=True)):
        for other, length, place in _view(graph, graph.nodes[node_id], index):
            row.places[i, first[other] : first[other] + length] = torch.arange(place, place + length)
    return row


def _view(graph: ThreadGraph, node: Node, index: int) -> Iterator[tuple[int, int, int]]:
    """What a token reads: (node, tokens, place of the first), its own node last."""
    if not node.views:
        for other, length in graph.view(node.context).items():
            yield other, length, graph.nodes[other].start
        yield node.id, index + 1, node.start
        return
    view, place = node.view_of(index), 0
    if len({read.node for read in view.reads}) < len(view.reads):
        raise UsageError(f"a view of node {node.id} names a node twice: its keys would have two places")
    for read, length in zip([*view.reads, Read(node.id, 0)], [*view.lengths(index), index + 1], strict=True):
        yield read.node, length, place
        place += length


@dataclass(frozen=True, slots=True)
class Places:
    """What the attention function needs; the same for all layers.

    Attributes:
        places: `[tokens, tokens]`; see the module.
        frequencies: of the rotation, radians per position, `[rotary dimensions / 2]`.
        attend: how to compute it: `by_rotating_keys` or `by_rotating_queries`.
    """

    places: Tensor
    frequencies: Tensor
    attend: Attend


Attend = Callable[[Tensor, Tensor, Tensor, Places, float], Tensor]


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Rotate `x` `[..., dimensions]` (float32) to `positions`, which broadcast against its leading dimensions.

    Half-split: dimension d turns with dimension d + half. What lies beyond twice the frequencies stays as it is
    (partial rotary).
    """
    half = len(frequencies)
    angles = positions.unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def by_rotating_keys(query: Tensor, key: Tensor, value: Tensor, row: Places, scale: float) -> Tensor:
    """The oracle: reader by reader, every key it sees is rotated to its place in the view, and one softmax taken.

    Args:
        query: `[batch, heads, tokens, dimensions]`, float32, as is the result.
        key: of the same shape, as is `value`.
        value: what is weighed.
        row: who sees what, and where.
        scale: of the scores.
    """
    out = []
    for i, places in enumerate(row.places):
        seen = (places >= 0).nonzero().squeeze(1)
        keys = rotate(key[:, :, seen], places[seen], row.frequencies)
        asks = rotate(query[:, :, i : i + 1], places[i], row.frequencies)
        weights = (asks @ keys.transpose(-1, -2) * scale).softmax(-1)
        out.append(weights @ value[:, :, seen])
    return torch.cat(out, 2)


def by_rotating_queries(query: Tensor, key: Tensor, value: Tensor, row: Places, scale: float) -> Tensor:
    """The form for training: as `by_rotating_keys`, for all readers at once.

    Only distances count, and from one view to another all keys of a node move by the same. So keys are rotated once,
    to their index in the node, and queries once for each node that is read.
    """
    scores, start = [], 0
    own = row.places.diagonal()
    for stop in _runs(row.places):
        places = row.places[:, start:stop]
        # Place of the node's first token for each reader; where none is seen the mask hides whatever comes out.
        offsets = places[:, 0]
        asks = rotate(query, own - offsets, row.frequencies)
        keys = rotate(key[:, :, start:stop], torch.arange(stop - start, device=key.device), row.frequencies)
        scores.append((asks @ keys.transpose(-1, -2) * scale).masked_fill(places < 0, -torch.inf))
        start = stop
    return torch.cat(scores, -1).softmax(-1) @ value


def _runs(places: Tensor) -> list[int]:
    """Where to cut the columns so that in each part the places of every reader rise by one, first column first."""
    before, after = places[:, :-1], places[:, 1:]
    together = (after < 0) | (before >= 0) & (after == before + 1)
    return [*(1 + (~together.all(0)).nonzero().squeeze(1)).tolist(), places.shape[1]]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    concurrent: Places,
    **options: Any,
) -> tuple[Tensor, None]:
    window = options.get("sliding_window")
    if attention_mask is not None or dropout or (window is not None and window < len(concurrent.places)):
        raise UsageError(f"{type(module).__name__} brings a mask, dropout or a sliding window; places have neither")
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise UsageError(f"{type(module).__name__} needs {name!r} in attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = key.float().repeat_interleave(groups, 1), value.float().repeat_interleave(groups, 1)
    out = concurrent.attend(query.float(), key, value, concurrent, scale)
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


@contextmanager
def _attending(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def frequencies(model: Any) -> Tensor:
    """The rotary frequencies of a model, radians per position.

    Raises:
        UsageError: it has none, different ones in different layers, or ones that change with the length.
    """
    found = [module for module in model.modules() if hasattr(module, "inv_freq")]
    if len(found) != 1 or found[0].rope_type in ("dynamic", "longrope"):
        raise UsageError(f"{type(model).__name__} has no rotary positions that are the same everywhere and always")
    result: Tensor = found[0].inv_freq.float()
    return result


def forward(model: Any, tokens: Tensor, places: Tensor, attend: Attend = by_rotating_queries) -> Tensor:
    """Logits `[batch, tokens, vocabulary]` of `tokens` `[batch, tokens]`, rows of one layout. Differentiable.

    Args:
        model: a Hugging Face model with full, half-split rotary attention through the attention interface. While it
            runs its attention is exchanged, so it can do nothing else at the same time.
        tokens: ids.
        places: `[tokens, tokens]`; see the module.
        attend: the form of the computation.
    """
    with _attending(model):
        logits: Tensor = model(
            input_ids=tokens,
            position_ids=torch.zeros_like(tokens),
            use_cache=False,
            concurrent=Places(places, frequencies(model), attend),
        ).logits
    return logits


def concurrent_logits(model: Any, graph: ThreadGraph, attend: Attend = by_rotating_keys) -> Tensor:
    """Logits `[tokens, vocabulary]` over a whole graph; entry i is token i of `concurrent_row(graph)`. Differentiable.

    Raises:
        UsageError: see `concurrent_row` and `frequencies`.
    """
    row = concurrent_row(graph)
    return forward(model, torch.tensor([row.tokens]), row.places, attend)[0].float()
