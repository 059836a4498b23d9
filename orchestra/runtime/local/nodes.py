"""What the cache is made of: stretches of tokens with keys and values, and where the nodes of a run lie in them.

A node of a run is usually one stretch. Ordinary causal nodes of different runs that begin with the same tokens share
stretches (`radix`): then a node is a part of one, or parts of several, and its own stretch holds only what is new.
Within one run no token of a stretch belongs to two nodes, because a join attends to each of its branches, even if they
say the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from orchestra.graph import Node, ThreadGraph

if TYPE_CHECKING:
    from orchestra.runtime.local.gang import Past, Reading
    from orchestra.runtime.local.jobs import Job
    from orchestra.runtime.local.segments import Segment

View = dict[int, int]
"""What a token attends to: node id to tokens."""

WHOLE = sys.maxsize
"""As the length of a hold: the stretch and all by which it grows."""


@dataclass(slots=True, eq=False)
class NodeState:
    """A stretch of tokens, and their keys and values.

    Attributes:
        id: a serial number; what a stretch attends to has lower ones, except after a split.
        start: position of its first token.
        tokens: the ids known here.
        parent: of an ordinary causal stretch, the one that it goes on from (the cache's empty root, if none); None
            after a reuse join or a concurrent node: no prefix match may find it.
        offset: after so many of the parent's tokens.
        seen: what the first token attends to, where there is no parent to tell it.
        branches: the ordinary stretches that go on from here, by offset and first token (`radix.NOTHING` without one).
        holders: the runs with nodes here, and how many of the tokens each needs; nobody after they have ended.
        computed: how many tokens have keys and values in the segment.
        segment: the sealed keys and values; None while a job's slot holds them, or when there are none.
        job: the generation that fills it, until it ends.
        readers: generations and scorings, waiting ones included, that attend to it.
        pinned: of these, how many are admitted; it is not evicted before they end.
        used: when it was last wanted; the oldest are evicted first.
        reading: of a concurrent node that has ended: what it read last.
        moved: of a settled concurrent node: the gang's past, where in it its keys are, and the position of the first.
    """

    id: int
    start: int
    tokens: list[int]
    parent: NodeState | None = None
    offset: int = 0
    seen: Context = field(default_factory=list)
    branches: dict[int, dict[int, list[NodeState]]] = field(default_factory=dict)
    holders: dict[Run, int] = field(default_factory=dict)
    computed: int = 0
    segment: Segment | None = None
    job: Job | None = None
    readers: int = 0
    pinned: int = 0
    used: int = 0
    reading: Reading | None = None
    moved: tuple[Past, int, int] | None = None

    @property
    def base(self) -> int:
        """The position that the first key is rotated for."""
        return self.start if self.moved is None else self.moved[2]

    @property
    def context(self) -> Context:
        """What the first token attends to."""
        chain: Context = []
        state, length = self.parent, self.offset
        if state is None:
            return self.seen
        while state.parent is not None:
            chain.append((state, length))
            state, length = state.parent, state.offset
        return chain[::-1]

    @property
    def done(self) -> int:
        """Tokens with keys and values, in a slot or sealed."""
        return self.job.fed if self.job is not None and self.job.slab is not None else self.computed

    @property
    def growing(self) -> bool:
        """Whether an admitted generation fills it: then its keys and values are in a slot, or will be."""
        return self.job is not None and self.job.admitted

    @property
    def room(self) -> int:
        """Tokens that fit into the segment."""
        return 0 if self.segment is None else self.segment.capacity

    def reads(self, length: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the first `length` tokens, `[layers, heads, length, dim]`, wherever they are now."""
        if self.moved is not None:
            past, first, _ = self.moved
            keys, values = past.reads(first + length)
            return keys[:, :, first:], values[:, :, first:]
        job = self.job
        if job is not None and job.slab is not None:
            slab, slot = job.slab, job.slot
            keys, values = slab.keys[:, slot], slab.values[:, slot]
            return keys[:, :, job.head : job.head + length], values[:, :, job.head : job.head + length]
        assert self.segment is not None
        return self.segment.keys[:, :, :length], self.segment.values[:, :, :length]


Context = list[tuple[NodeState, int]]
"""What a token attends to, ancestors first: stretches and how many of their tokens."""


class Part(NamedTuple):
    """The tokens of a stretch from `first` on; read like a stretch."""

    state: NodeState
    first: int

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.state.start + self.first

    @property
    def base(self) -> int:
        """The position that the first key is rotated for."""
        return self.state.base + self.first

    def reads(self, length: int) -> tuple[Tensor, Tensor]:
        """See `NodeState.reads`."""
        keys, values = self.state.reads(self.first + length)
        return keys[:, :, self.first :], values[:, :, self.first :]


class Piece(NamedTuple):
    """Tokens `start..stop` of a stretch, which are tokens of one node; all that come when `stop` is None."""

    state: NodeState
    start: int
    stop: int | None

    @property
    def end(self) -> int:
        """How many tokens of the stretch one reads to see the piece whole."""
        return len(self.state.tokens) if self.stop is None else self.stop


@dataclass(slots=True, eq=False)
class Place:
    """Where the tokens of a graph node are.

    Attributes:
        start: position of the node's first token.
        view: what its first token attends to besides itself.
        plain: an ordinary causal node: its path is nothing but a string of tokens.
        tip: of a plain node, the place in the cache's tree after which it begins.
        pieces: its tokens, in order. Only the last may grow.
    """

    start: int
    view: View
    plain: bool
    tip: tuple[NodeState, int]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Tokens of the node that are known here."""
        return sum(piece.end - piece.start for piece in self.pieces)

    @property
    def end(self) -> tuple[NodeState, int]:
        """The place after its last token."""
        return (self.pieces[-1].state, self.pieces[-1].end) if self.pieces else self.tip

    def after(self, length: int) -> tuple[NodeState, int]:
        """The place after the first `length` tokens, at least one."""
        for piece in self.pieces:
            size = piece.end - piece.start
            if length <= size:
                return piece.state, piece.start + length
            length -= size
        raise IndexError("the node is not so long")

    def parts(self, length: int) -> list[tuple[NodeState | Part, int]]:
        """What has to be read to see the first `length` tokens of the node, and nothing else."""
        found: list[tuple[NodeState | Part, int]] = []
        for state, start, stop in self.pieces:
            n = min(length, (len(state.tokens) if stop is None else stop) - start)
            if n > 0:
                found.append((Part(state, start) if start else state, n))
            length -= n
        return found

    def ready(self, length: int) -> bool:
        """Whether the first `length` tokens have keys and values."""
        for state, start, stop in self.pieces:
            n = min(length, (len(state.tokens) if stop is None else stop) - start)
            if n > 0 and state.done < start + n:
                return False
            length -= n
        return True

    def close(self) -> None:
        """What it holds now stays as it is: others may be reading it."""
        if self.pieces:
            last = self.pieces[-1]
            self.pieces[-1] = last._replace(stop=last.end)


@dataclass(slots=True, eq=False)
class Run:
    """One graph on the engine, until it is released.

    Attributes:
        graph: kept, so that no other graph can get its identity.
        nodes: where they are, by id.
        states: the stretches that it holds.
    """

    graph: ThreadGraph
    nodes: dict[int, Place] = field(default_factory=dict)
    states: dict[NodeState, None] = field(default_factory=dict)

    def context(self, view: View, also: Sequence[Piece] = ()) -> Context:
        """A view as the stretches to be read; `also` is read after it."""
        lengths: dict[NodeState, int] = {}
        for i, length in view.items():
            for state, start, stop in self.nodes[i].pieces:
                end = len(state.tokens) if stop is None else stop
                lengths[state] = max(lengths.get(state, 0), min(end, start + length))
                length -= end - start
                if length <= 0:
                    break
        for piece in also:
            lengths[piece.state] = max(lengths.get(piece.state, 0), piece.end)
        return list(lengths.items())


@dataclass(slots=True, eq=False)
class Snapshot:
    """What an event loop tells the worker about one node.

    Attributes:
        id, start, view, tokens: of the node.
        parent: `(node id, length)` of its one context edge; None without one, or with several.
        joined: it has several context edges, or read nodes that grew beside it: its cache is no string's.
    """

    id: int
    start: int
    view: View
    tokens: list[int]
    parent: tuple[int, int] | None = None
    joined: bool = False


def snapshot(node: Node, view: View, tokens: list[int]) -> Snapshot:
    """What to tell of a node.

    Args:
        node: of the graph.
        view: what its first token attends to besides itself.
        tokens: of the node.
    """
    parent = node.context[0] if len(node.context) == 1 else None
    return Snapshot(node.id, node.start, view, tokens, parent, bool(node.views) or len(node.context) > 1)
