"""`flatten(graph)`: the thread graph as one training row.

Nodes stand in the row in the order of the graph. The first token of a node is predicted by the last token of its
context parent; where that token does not stand right before it, an *echo* of it does: same id, position and view, seen
by nobody. So the ordinary label shift of any trainer is right for every token that something predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from orchestra.errors import UsageError
from orchestra.graph import ThreadGraph

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Row:
    """One training row; all lists have an entry per token.

    Attributes:
        tokens: ids.
        positions: positions along the token's own path; siblings share them.
        nodes: the node a token belongs to; an echo has the node of the token that it repeats.
        indices: the token's index in its node.
        echoes: True for echoes.
        weights: loss weight of *predicting* the token (from the entry right before it). The weight of its span for
            sampled tokens; 0 for prompts, for what the orchestrator forced, and for echoes. A demonstration marks what
            it teaches as sampled.
        predecessors: the entry whose logits predict the token: always the one before it, or None for echoes and for
            what nothing predicts (the first token of a root or of a reuse join).
        views: for each node, how many tokens of each other node its tokens attend to. With `indices` and `echoes` this
            is the whole mask: entry i sees entry j if j is no echo and either both are of one node and j's index is
            not larger, or j's index is smaller than `views[node of i][node of j]`.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    echoes: list[bool] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    predecessors: list[int | None] = field(default_factory=list)
    views: dict[int, dict[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self, i: int, j: int) -> bool:
        """Whether entry i attends to entry j."""
        if self.echoes[j]:
            return False
        if self.nodes[i] == self.nodes[j]:
            return self.indices[j] <= self.indices[i]
        return self.indices[j] < self.views[self.nodes[i]].get(self.nodes[j], 0)

    @property
    def plain(self) -> bool:
        """Whether it is an ordinary sequence: every entry sees all before it, at positions from 0 on."""
        if any(self.echoes) or self.positions != list(range(len(self))):
            return False
        first = {node: at for at, node in reversed(list(enumerate(self.nodes)))}
        return all(sum(view.values()) == first[node] for node, view in self.views.items())

    def columns(self) -> dict[str, list[Any]]:
        """The row as columns of a data set; `from_columns` reads them back.

        Returns:
            `input_ids`, `position_ids`, `nodes`, `indices`, `echoes`, `loss_weights`: as the attributes;
            `predecessors`: -1 for None; `views`: triples `[node, other, length]`.
        """
        return {
            "input_ids": self.tokens,
            "position_ids": self.positions,
            "nodes": self.nodes,
            "indices": self.indices,
            "echoes": self.echoes,
            "loss_weights": self.weights,
            "predecessors": [-1 if before is None else before for before in self.predecessors],
            "views": [[node, other, length] for node, view in self.views.items() for other, length in view.items()],
        }

    @classmethod
    def from_columns(cls, example: Mapping[str, Any]) -> Self:
        """The row in the columns of an example. `input_ids` alone are a plain sequence, of which all is learned.

        Raises:
            UsageError: columns of different lengths, or a mask that refers to a node that is not there.
        """
        tokens = list(example["input_ids"])
        if example.get("nodes") is None:
            weights = example.get("loss_weights")
            return cls.sequence(tokens, [1.0] * len(tokens) if weights is None else weights)
        row = cls(tokens, views={node: {} for node in example["nodes"]})
        row.positions, row.nodes = list(example["position_ids"]), list(example["nodes"])
        row.indices, row.echoes = list(example["indices"]), list(example["echoes"])
        row.weights = list(example["loss_weights"])
        row.predecessors = [None if before < 0 else before for before in example["predecessors"]]
        columns: list[list[Any]] = [row.positions, row.nodes, row.indices, row.echoes, row.weights, row.predecessors]
        lengths = {len(row), *map(len, columns)}
        if len(lengths) > 1:
            raise UsageError(f"columns of a row have different lengths: {', '.join(map(str, sorted(lengths)))}")
        for node, other, length in example["views"]:
            if node not in row.views or other not in row.views:
                raise UsageError(f"a row's view names node {other if node in row.views else node}, which has no token")
            row.views[node][other] = length
        return row

    @classmethod
    def sequence(cls, tokens: Sequence[int], weights: Sequence[float]) -> Self:
        """A plain sequence; `weights[i]` is that of predicting token i (nothing predicts the first one).

        Raises:
            UsageError: there are not as many weights as tokens.
        """
        if len(tokens) != len(weights):
            raise UsageError(f"{len(tokens)} tokens but {len(weights)} loss weights")
        size = len(tokens)
        return cls(
            list(tokens),
            list(range(size)),
            [0] * size,
            list(range(size)),
            [False] * size,
            [0.0, *map(float, weights[1:])][:size],
            [None, *range(size - 1)][:size],
            {0: {}} if size else {},
        )

    def _add(self, token: int, position: int, node: int, index: int, weight: float, predecessor: int | None) -> None:
        self.tokens.append(token)
        self.positions.append(position)
        self.nodes.append(node)
        self.indices.append(index)
        self.echoes.append(False)
        self.weights.append(weight)
        self.predecessors.append(predecessor)


def flatten(graph: ThreadGraph) -> Row:
    """The whole graph as a training row. Nodes without tokens contribute nothing.

    Raises:
        UsageError: a span counts tokens whose ids are not known, or the graph has concurrent nodes: what they read
            changed from token to token, and is no mask between nodes.
    """
    row = Row()
    for node in graph.nodes:
        tokens = node.tokens
        if len(tokens) != len(node):
            raise UsageError(f"node {node.id} has {len(node)} tokens but {len(tokens)} token ids; training needs all")
        if not tokens:
            continue
        if node.views:
            raise UsageError(f"node {node.id} read nodes that grew beside it; it has no place in a training row")
        row.views[node.id] = graph.view(node.context)
        weights = [s.weight if s.origin == "sampled" else 0.0 for s in node.spans for _ in range(s.count)]
        predecessor: int | None = None
        if len(node.context) == 1:
            parent, length = node.context[0]
            if not row.tokens or (row.nodes[-1], row.indices[-1], row.echoes[-1]) != (parent, length - 1, False):
                _echo(row, graph, parent, length - 1)
            predecessor = len(row) - 1
        for index, (token, weight) in enumerate(zip(tokens, weights, strict=True)):
            if predecessor is None:
                weight = 0.0
            row._add(token, node.start + index, node.id, index, weight, predecessor)
            predecessor = len(row) - 1
    return row


def _echo(row: Row, graph: ThreadGraph, node: int, index: int) -> None:
    row._add(graph.nodes[node].tokens[index], graph.nodes[node].start + index, node, index, 0.0, None)
    row.echoes[-1] = True


def dense_mask(row: Row) -> Tensor:
    """The mask as a boolean matrix: `[tokens, tokens]`, True where entry i (first) attends to entry j (second)."""
    import torch

    ids = {node: i for i, node in enumerate(row.views)}
    reach = torch.zeros(len(ids), len(ids), dtype=torch.int64)
    for node, view in row.views.items():
        for other, length in view.items():
            if other in ids:
                reach[ids[node], ids[other]] = length
    owner = torch.tensor([ids[node] for node in row.nodes], dtype=torch.int64)
    index = torch.tensor(row.indices, dtype=torch.int64)
    same = owner.unsqueeze(1) == owner.unsqueeze(0)
    seen = torch.where(same, index.unsqueeze(0) <= index.unsqueeze(1), index.unsqueeze(0) < reach[owner][:, owner])
    return seen & ~torch.tensor(row.echoes, dtype=torch.bool).unsqueeze(0)
