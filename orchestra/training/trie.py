"""Merging what several sequences share, so that it is computed once.

ThreadWeaver (arXiv:2512.07843, section 3) trains on *units*: what one request saw and what it wrote. The units of a
trajectory begin alike and, where threads are joined as text, repeat one another. As a prefix tree a token stands once,
sees its ancestors and nothing else, and has its depth as position: each unit is a chain from the root, and what it is
predicted from is what it would be predicted from alone.

The weight of a merged token is the sum of those of its copies. So the loss is that of the units, and where a copy that
was sampled meets one that was forced (weight 0), the sampled one is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestra.errors import UsageError
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.training.flatten import Row, flatten


class Unit(NamedTuple):
    """One request: what it was given and what it wrote.

    Attributes:
        context: token ids that it saw.
        completion: token ids that it sampled.
        weight: loss weight of each token of the completion.
    """

    context: Sequence[int]
    completion: Sequence[int]
    weight: float = 1.0


_Key = tuple[int, int]
"""A token, and 0 or the node that keeps it apart from others that say the same."""


@dataclass(slots=True)
class _State:
    """A token in its place: where it is in the tree, and what it weighs."""

    token: int
    weight: float = 0.0
    next: dict[_Key, _State] = field(default_factory=dict)
    seen: list[_State] = field(default_factory=list)  # by the first token of a joined chain: the ends of the branches
    last: int = -1  # the node of the merged graph that it came to stand in, and its index there
    index: int = -1


@dataclass
class _Forest:
    """Chains of states. One begins after nothing, or after the ends of several branches, which is a reuse join."""

    first: dict[tuple[int, ...], dict[_Key, _State]] = field(default_factory=dict)

    def walk(
        self, after: Sequence[_State], tokens: Sequence[int], weights: Sequence[float], apart: int = 0
    ) -> list[_State]:
        """The states of `tokens` after those, made where they are not there yet; `apart` keeps the first to itself."""
        if len(after) == 1:
            into = after[0].next
        else:
            into = self.first.setdefault(tuple(sorted(map(id, after))), {})
        states: list[_State] = []
        for token, weight in zip(tokens, weights, strict=True):
            key = (token, 0 if states else apart)
            state = into.get(key)
            if state is None:
                state = into[key] = _State(token)
                if not states and len(after) > 1:
                    state.seen = list(after)
            state.weight += weight
            states.append(state)
            into = state.next
        return states

    def graph(self) -> ThreadGraph:
        """The forest as a graph: a node for every stretch that does not branch, depth first, those seen first."""
        graph = ThreadGraph()
        starts = [state for heads in self.first.values() for state in heads.values()]
        waiting: list[tuple[_State, list[Edge] | None]] = [
            (state, [] if not state.seen else None) for state in reversed(starts)
        ]
        later: list[_State] = []
        while waiting or later:
            if not waiting:  # joins come after all that they may see
                ready = next(state for state in later if all(branch.last >= 0 for branch in state.seen))
                later.remove(ready)
                waiting.append((ready, [Edge(branch.last, branch.index + 1) for branch in ready.seen]))
            state, context = waiting.pop()
            if context is None:
                later.append(state)
                continue
            run = [state]
            while len(run[-1].next) == 1:
                run += run[-1].next.values()
            node = graph.add(context, spans=_spans(run))
            for index, one in enumerate(run):
                one.last, one.index = node.id, index
            end = [Edge(node.id, len(run))]
            waiting += [(state, end) for state in reversed(run[-1].next.values())]
        return graph


def _spans(run: Sequence[_State]) -> list[Span]:
    spans: list[Span] = []
    for state in run:
        if not spans or spans[-1].weight != state.weight:
            spans.append(Span("sampled" if state.weight else "forced", weight=state.weight))
        spans[-1].tokens.append(state.token)
        spans[-1].count += 1
    return spans


def merge(units: Sequence[Unit]) -> Row:
    """Units as one row, shared tokens once.

    Tokens stand depth first, children in the order in which they were first seen; give the whole trajectory first and
    its branches after it, as the paper does.

    Raises:
        UsageError: a unit has no context, so nothing predicts its first token.
    """
    forest = _Forest()
    for unit in units:
        if not unit.context:
            raise UsageError("a unit has at least one token of context: nothing else predicts its first one")
        tokens = [*unit.context, *unit.completion]
        forest.walk([], tokens, [0.0] * len(unit.context) + [unit.weight] * len(unit.completion))
    return flatten(forest.graph())


def merge_graph(graph: ThreadGraph) -> Row:
    """A graph as a row, as `flatten` has it, but what two nodes say after the same context is computed once.

    Joined threads that were written again as text (ThreadWeaver) merge with the first of them. Branches of a reuse join
    stay apart: it attends to each of them, also where they say the same.

    Raises:
        UsageError: as `flatten`.
    """
    forest = _Forest()
    known: dict[int, list[_State]] = {}
    apart = {branch for node in graph.nodes if len(node.context) > 1 for branch in _branches(graph, node)}
    for node in graph.nodes:
        tokens = node.tokens
        if len(tokens) != len(node) or node.views:
            flatten(graph)  # says why
        after = [known[parent][length - 1] for parent, length in node.context]
        weights = [span.weight if span.origin == "sampled" else 0.0 for span in node.spans for _ in range(span.count)]
        if len(after) != 1 and weights:
            weights[0] = 0.0  # nothing predicts it
        known[node.id] = forest.walk(after, tokens, weights, node.id + 1 if node.id in apart else 0)
    return flatten(forest.graph())


def _branches(graph: ThreadGraph, join: Node) -> set[int]:
    """The nodes that a join sees through some of its context parents and not through all."""
    views = [set(graph.view([edge])) for edge in join.context]
    return set().union(*views) - views[0].intersection(*views)
