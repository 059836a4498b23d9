"""The cache is the thread graph: which node's keys and values are held where, and when they may go.

Invariants: a node's keys and values are in its segment, or in the slot of the job that fills it, or nowhere. What a
live job or score may still read is pinned. Everything that is dropped can be computed again from the node's tokens.
"""

from __future__ import annotations

from orchestra.graph import ThreadGraph
from orchestra.runtime.attention.cost import in_place
from orchestra.runtime.local.jobs import Context, Job, NodeState, Run, Snapshot
from orchestra.runtime.local.segments import Arena, Memory, Segment


class Cache:
    """All runs and their keys and values.

    Args:
        memory: the shape of keys and values, and their bytes.
        limit: bytes above which `evict` drops what nobody reads; None for no limit.
        copy_bytes: see `attention.cost`; 0 reads every context segment in place.

    Attributes:
        arena: the slots of running generations.
        runs: by identity of their graph.
        tokens: with keys and values; copies are not counted.
    """

    def __init__(self, memory: Memory, limit: int | None, copy_bytes: int) -> None:
        self.memory, self.limit = memory, limit
        self.arena = Arena(memory)
        self.runs: dict[int, Run] = {}
        self.tokens = 0
        # In a slot of a windowed model stands nothing but the node itself: its positions are then consecutive.
        self._copy_bytes = 0 if memory.windows else copy_bytes
        self._clock = 0

    def full(self) -> bool:
        """Whether there is more than the limit."""
        return self.limit is not None and self.memory.bytes > self.limit

    def learn(self, graph: ThreadGraph, nodes: list[Snapshot]) -> Run:
        """Take in nodes, or further tokens of nodes, of a run."""
        run = self.runs.get(id(graph))
        if run is None:
            run = self.runs[id(graph)] = Run(graph)
        for seen in nodes:
            state = run.nodes.get(seen.id)
            if state is None:
                run.nodes[seen.id] = NodeState(seen.id, seen.start, seen.view, seen.tokens)
            elif len(seen.tokens) > len(state.tokens):
                state.tokens += seen.tokens[len(state.tokens) :]
        return run

    def pin(self, run: Run, view: dict[int, int]) -> Context:
        """Keep what a view reads until `unpin`."""
        self._clock += 1
        context = [(run.nodes[i], length) for i, length in view.items()]
        for state, _ in context:
            state.readers += 1
            state.used = self._clock
        return context

    def unpin(self, context: Context) -> None:
        """Undo `pin`."""
        for state, _ in context:
            state.readers -= 1

    def place(self, job: Job) -> None:
        """Give a generation a slot: the short part of its context is copied to the head, the rest read in place."""
        head: Context = []
        token_bytes = self.memory.token_bytes // self.memory.layers
        room = self._copy_bytes // token_bytes
        for state, length in job.context:
            if length > room or in_place(length, state.readers, token_bytes, self._copy_bytes):
                job.inplace.append((state, length))
            else:
                head.append((state, length))
                room -= length
        state = job.state
        if state.computed:  # an earlier reader had the node's forced tokens computed; the last is fed again for logits
            job.fed = min(state.computed, job.forced - 1)
            head.append((state, job.fed))
            self.tokens += job.fed  # `drop` below takes them off
        tokens = sum(length for _, length in head)
        pieces = [other.reads(length) for other, length in head]
        slab = self.arena.place(job, tokens + job.forced - job.fed + 1)
        job.head = tokens - job.fed
        at = 0
        for (_, length), (keys, values) in zip(head, pieces, strict=True):
            slab.keys[:, job.slot, :, at : at + length] = keys
            slab.values[:, job.slot, :, at : at + length] = values
            at += length
        slab.used[job.slot] = tokens
        self.drop(state)

    def seal(self, job: Job) -> None:
        """End a generation: its keys and values go from the slot to a segment of the node's size."""
        state = job.state
        if job.slab is not None:
            if job.fed:
                keys, values = state.reads(job.fed)
                segment = Segment(self.memory, len(state.tokens))
                segment.keys[:, :, : job.fed] = keys
                segment.values[:, :, : job.fed] = values
                state.segment, state.computed = segment, job.fed
            self.arena.leave(job)
        state.job = None

    def drop(self, state: NodeState) -> None:
        """Give back a segment."""
        if state.segment is not None:
            state.segment.free()
            self.tokens -= state.computed
            state.segment, state.computed = None, 0

    def evict(self) -> None:
        """Drop segments that nobody reads, those last used first, until the limit is kept."""
        if not self.full():
            return
        idle = [
            s for run in self.runs.values() for s in run.nodes.values() if s.segment and not s.readers and not s.job
        ]
        for state in sorted(idle, key=lambda state: state.used):
            if not self.full():
                return
            self.drop(state)
