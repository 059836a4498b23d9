"""The concurrent cache: generations in lock-step that read each other while they grow (arXiv:2504.06261, section 3).

Keys are stored once, rotated for where they were computed. Each reader has an order of nodes of its own, placed one
after another; where a node stands elsewhere than where it was computed, the reader's query is turned by the difference.
Nodes at the beginning of everybody's order that have ended are settled: their keys are turned once, to where they will
stay, and moved together, so that the common past is one read however many steps it is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from orchestra.graph import Edge, Read, ThreadGraph, View
from orchestra.runtime.engine import Gang
from orchestra.runtime.local.nodes import Context, NodeState, Part, Place, Run, Snapshot, snapshot
from orchestra.runtime.local.segments import Memory, Segment

if TYPE_CHECKING:
    from orchestra.runtime.attention.reads import Rotary
    from orchestra.runtime.local.cache import Cache
    from orchestra.runtime.local.jobs import Job
    from orchestra.runtime.local.pack import Pack
    from orchestra.runtime.local.segments import Slab
    from orchestra.runtime.local.worker import Worker


class Placed(NamedTuple):
    """Tokens of a node as they stand in a view: `length` of a stretch or a part, the first at position `place`."""

    state: NodeState | Part
    length: int
    place: int
    node: int


class Reading(NamedTuple):
    """What a concurrent node reads besides itself.

    Attributes:
        reads: what is not settled.
        place: of its own first token.
        kept: how many of the settled nodes that stayed where they were it reads, and
        past: how many tokens of those that were moved together.
    """

    reads: list[Placed]
    place: int
    kept: int
    past: int


class Past:
    """The settled nodes of a gang, one after another, each turned to where it stands. Read like a node."""

    start = base = 0

    def __init__(self, memory: Memory, rotary: Rotary) -> None:
        self.memory, self.rotary = memory, rotary
        self.segment: Segment | None = None
        self.length = 0

    def reads(self, length: int) -> tuple[Tensor, Tensor]:
        """The keys and values of the first `length` tokens, `[layers, heads, length, dim]`."""
        assert self.segment is not None
        return self.segment.keys[:, :, :length], self.segment.values[:, :, :length]

    def take(self, state: NodeState | Part, n: int, place: int) -> None:
        """Copy the first `n` tokens of a stretch, turned to `place`."""
        keys, values = state.reads(n)
        if self.segment is None:
            self.segment = Segment(self.memory, max(64, n))
        elif self.segment.capacity < self.length + n:
            self.segment.grow(max(self.length + n, 2 * self.segment.capacity), self.length)
        at = slice(self.length, self.length + n)
        by = torch.full((n,), place - state.base, dtype=torch.int64, device=self.memory.device)
        for layer in range(self.memory.layers):
            turned = self.rotary.turn(keys[layer].transpose(0, 1), by, layer)
            self.segment.keys[layer, :, at] = turned.transpose(0, 1)
        self.segment.values[:, :, at] = values
        self.length += n

    def free(self) -> None:
        """Give the memory back."""
        if self.segment is not None:
            self.segment.free()
            self.segment, self.length = None, 0


class LocalGang(Gang):
    """A gang of a run. `arrange` and `leave` belong to the run's event loop, everything else to the worker's thread.

    Args:
        worker: the engine's thread.
        graph: the run.
        members: how many generations it waits for before each step.
        context: most positions of a view.
        cache: of keys and values.
        rotary: how the model turns queries.

    Attributes:
        slab: the slots of its members, once the first has one.
    """

    def __init__(
        self, worker: Worker, graph: ThreadGraph, members: int, context: int, cache: Cache, rotary: Rotary
    ) -> None:
        self.graph, self.members, self.context = graph, members, context
        self.slab: Slab | None = None
        self._worker, self._cache = worker, cache
        self._run: Run | None = None
        self._orders: dict[int, tuple[Edge, ...]] = {}
        self._pinned: dict[int, Context] = {}  # ordinary nodes in somebody's order, with what they read
        self._held: list[NodeState] = []  # members that have ended: what they read is not there any more
        self._stay = 0  # nodes at the beginning of every order that stay where they are
        self._settled = 0  # how many of them have been moved there
        self._kept: list[Placed] = []  # those of them that are read where they were computed
        self._span = 0  # their tokens
        self._past = Past(cache.memory, rotary)
        self._version = 0  # of the orders and of what is settled

    # -- on the event loop ---------------------------------------------------------------------------------------

    def arrange(self, views: Mapping[int, Sequence[Edge]], settled: int = 0) -> None:
        """See `Gang.arrange`."""
        graph, snapshots = self.graph, []
        for i in {edge.parent for order in views.values() for edge in order}:
            if graph.nodes[i].views:
                continue  # concurrent: known from its generation
            for j in (*graph.view(graph.nodes[i].context), i):
                node = graph.nodes[j]
                snapshots.append(snapshot(node, graph.view(node.context), node.tokens))
        orders = {node: tuple(order) for node, order in views.items()}
        self._worker.post(lambda: self._arrange(orders, snapshots, settled))

    def leave(self) -> None:
        """See `Gang.leave`."""
        self._worker.leave(self)

    # -- on the worker's thread ----------------------------------------------------------------------------------

    def _arrange(self, orders: dict[int, tuple[Edge, ...]], snapshots: list[Snapshot], settled: int) -> None:
        self._run = run = self._cache.learn(self.graph, snapshots)
        for seen in snapshots:
            if seen.id not in self._pinned:
                context = self._pinned[seen.id] = run.context({**seen.view, seen.id: len(seen.tokens)})
                self._cache.hold(context)
        self._orders |= orders
        self._stay = settled
        self._version += 1

    def close(self) -> None:
        """Give back what it holds."""
        for context in self._pinned.values():
            self._cache.let_go(context)
        self._pinned.clear()
        self._cache.tokens -= self._past.length
        self._past.free()
        self._cache.let_go([(state, 0) for state in self._held])
        self._held.clear()
        self._orders.clear()

    def jobs(self) -> list[Job]:
        """Its generations with a slot, by slot."""
        return [] if self.slab is None else self.slab.jobs

    def complete(self) -> bool:
        """Whether all members are there, so that the gang can make a step once `context` is computed."""
        return 0 < self.members <= len(self.jobs())

    def unsettled(self) -> Context:
        """The ordinary nodes that members read, and what those read, ancestors first."""
        needed: dict[NodeState, int] = {}
        for job in self.jobs():
            for i, _ in self._order(job)[self._settled :]:
                for state, n in self._pinned.get(i, ()):
                    needed[state] = max(n, needed.get(state, 0))
        return list(needed.items())

    def wrong(self) -> str | None:
        """Why the gang cannot go on, or None."""
        first = None
        for job in self.jobs():
            order, name = self._orders.get(_node(job)), _node(job)
            if order is None:
                return f"nobody has said what concurrent node {name} reads"
            first = order[: self._stay] if first is None else first
            if order[: self._stay] != first or len(first) < self._stay:
                return f"concurrent node {name} does not read first what is settled"
            for place, (i, _) in enumerate(order[self._settled :], self._settled):
                known = self._nodes.get(i)
                state = known.pieces[-1].state if known is not None and known.pieces else None
                if state is None or (i not in self._pinned and state.reading is None and state.job not in self.jobs()):
                    return f"concurrent node {name} reads node {i}, which has not been generated with its gang"
                if place < self._stay and state.job is not None:
                    return f"node {i} is being generated; it cannot be settled"
        return None

    @property
    def _nodes(self) -> dict[int, Place]:
        assert self._run is not None  # arranged
        return self._run.nodes

    def _order(self, job: Job) -> tuple[Edge, ...]:
        return self._orders[_node(job)]

    @property
    def need(self) -> int:
        """Bytes that `settle` may allocate now."""
        if self._settled >= self._stay or not self.complete():
            return 0
        tokens = (
            sum(n for _, n in self._order(self.jobs()[0])[self._settled : self._stay]) if self.wrong() is None else 0
        )
        return 2 * max(64, self._past.length + tokens) * self._cache.memory.token_bytes

    def settle(self) -> None:
        """Move the nodes that stay to where they do."""
        order = self._order(self.jobs()[0])
        while self._settled < self._stay:
            i, n = order[self._settled]
            node = self._nodes[i]
            if not node.ready(n):
                return  # its last token is computed in this step
            stays = node.start == self._span
            for state, length in node.parts(n):
                if stays:
                    self._kept.append(Placed(state, length, self._span, i))
                else:
                    self._past.take(state, length, self._span)
                    self._cache.tokens += length
                    if i not in self._pinned and isinstance(state, NodeState):  # a concurrent node: nobody reads it
                        self._cache.drop(state)
                        state.moved = self._past, self._past.length - length, self._span
                self._span += length
            self._settled += 1
            self._version += 1

    def feed(self, pack: Pack) -> None:
        """Compute the last tokens of members that have ended, each with what it was reading then."""
        for job in self.jobs():
            for i, n in self._order(job)[self._settled :]:
                state = self._nodes[i].pieces[-1].state
                if state.reading is None or state.job is not None or state in pack.filled:
                    continue
                if state.done < n:
                    rows = pack.add_fill(state, [], n - state.done)
                    self._plan(pack, state, state.reading, rows)
                    for placed in state.reading.reads:
                        pack.read(placed.state, placed.length, rows, self._turn(state, state.reading, placed))

    def read(self, pack: Pack, first: int) -> None:
        """Plan what the members' rows of this step read besides their own nodes.

        Args:
            pack: the step; the members' rows and forced tokens are in it.
            first: row of the first slot.
        """
        jobs = self.jobs()
        assert self.slab is not None
        grown = {job.state: n for job, n in zip(jobs, pack.grown(self.slab), strict=True)}
        readings = [self._reading(job, lambda state, n: grown.get(state, n)) for job in jobs]
        # Whom everybody reads is read by one product for all; anything else by separate ones.
        mutual = all(sum(placed.state in grown for placed in r.reads) == len(jobs) - 1 for r in readings)
        turns = [[0] * len(jobs) for _ in jobs]
        for slot, (job, reading) in enumerate(zip(jobs, readings, strict=True)):
            chunk = pack.forced.get(job, range(0))
            rows = [*chunk, first + slot]
            self._plan(pack, job.state, reading, rows)
            for placed in reading.reads:
                turn = self._turn(job.state, reading, placed)
                other = placed.state.job if isinstance(placed.state, NodeState) else None
                if mutual and other is not None:
                    turns[other.slot][slot] = turn
                    pack.read(placed.state, placed.length, chunk, turn)
                else:
                    pack.read(placed.state, placed.length, rows, turn)
            self._note(job, reading.reads, grown, alone=not chunk)
            if reading.place + grown[job.state] + len(jobs) >= self.context:
                job.limit = min(job.limit, job.sampled + 1)
        if mutual and len(jobs) > 1:
            pack.gangs[first] = [[first + i for i in range(len(jobs))]] * len(jobs), turns

    def _plan(self, pack: Pack, state: NodeState, reading: Reading, rows: Sequence[int]) -> None:
        """Read what is settled."""
        for placed in self._kept[: reading.kept]:
            pack.read(placed.state, placed.length, rows, self._turn(state, reading, placed))
        pack.read(self._past, reading.past, rows, reading.place - state.start)

    @staticmethod
    def _turn(state: NodeState, reading: Reading, placed: Placed) -> int:
        """By how much the queries of `state` are turned to see a node at its place, and themselves at theirs."""
        return reading.place - state.start - placed.place + placed.state.base

    def _reading(self, job: Job, length: Callable[[NodeState, int], int]) -> Reading:
        reads, place = [], self._span
        for i, n in self._order(job)[self._settled :]:
            node = self._nodes[i]
            parts = node.parts(n) if i in self._pinned else [(node.pieces[-1].state, n)]
            for state, size in parts:
                size = length(state, size) if isinstance(state, NodeState) else size
                reads.append(Placed(state, size, place, i))
                place += size
        return Reading(reads, place, len(self._kept), self._past.length)

    def _note(self, job: Job, reads: Sequence[Placed], grown: Mapping[NodeState, int], alone: bool) -> None:
        """Record what the tokens of this step read, unless the last record says so already.

        Args:
            job: the member.
            reads: what it reads.
            grown: tokens of all members, those of this step included.
            alone: one token of the member is fed; for a chunk of several nothing grows.
        """
        whole: dict[int, int] = {}  # by node: one may be several stretches
        for placed in reads:
            whole[placed.node] = whole.get(placed.node, 0) + placed.length
        growing = {placed.node for placed in reads if alone and placed.state in grown}
        lengths, grows = list(whole.values()), [int(i in growing) for i in whole]
        if job.expected != (self._version, lengths):
            moving = [Read(i, n, more) for (i, n), more in zip(whole.items(), grows, strict=True)]
            job.views.append(View(job.fed, self._steady(job) + moving))
        job.expected = self._version, [n + more for n, more in zip(lengths, grows, strict=True)]

    def _steady(self, job: Job) -> list[Read]:
        return [Read(i, n) for i, n in self._order(job)[: self._settled]]

    def end(self, job: Job) -> None:
        """A member has ended: keep what it reads now, for its tokens that were not fed, and record it."""
        if job.slab is None or _node(job) not in self._orders:
            return
        self._held.append(job.state)
        self._cache.hold([(job.state, 0)])
        job.state.reading = reading = self._reading(
            job, lambda state, n: state.done if state.job else min(n, state.done)
        )
        if job.fed < len(job.state.tokens):
            whole: dict[int, int] = {}
            for placed in reading.reads:
                whole[placed.node] = whole.get(placed.node, 0) + placed.length
            job.views.append(View(job.fed, self._steady(job) + [Read(i, n) for i, n in whole.items()]))

    @property
    def memory(self) -> int:
        """Bytes of what it has moved together."""
        return 0 if self._past.segment is None else self._past.segment.bytes

    @property
    def tokens(self) -> int:
        """Tokens of what it has moved together."""
        return self._past.length

    def holds(self) -> list[NodeState]:
        """What it keeps from being evicted, as often as it does."""
        return [*self._held, *(state for context in self._pinned.values() for state, _ in context)]


def _node(job: Job) -> int:
    """The graph's node that a generation fills."""
    return job.nodes[-1].id
