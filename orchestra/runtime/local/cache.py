"""The cache is the thread graph: which stretch's keys and values are held where, and when they may go.

Invariants (`integrity` checks them): a stretch's keys and values are in its segment, or in the slot of the job that
fills it, or nowhere. What an admitted job or score may still read is pinned. Everything that is dropped can be computed
again from the tokens. Memory is allocated when somebody is admitted or grows (`admission`), not while a step is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count

from orchestra.graph import ThreadGraph
from orchestra.runtime.attention.cost import in_place
from orchestra.runtime.local import radix
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.nodes import WHOLE, Context, NodeState, Piece, Place, Run, Snapshot
from orchestra.runtime.local.segments import Arena, Memory, Segment


class Cache:
    """All runs and their keys and values.

    Args:
        memory: the shape of keys and values, their bytes and their limit.
        copy_bytes: see `attention.cost`; 0 reads every context segment in place.
        keep: bytes of keys and values of ended runs that may stay, for prompts that begin like theirs.

    Attributes:
        arena: the slots of running generations.
        root: the place before every first token.
        runs: by identity of their graph.
        sealed: the stretches that have a segment.
        kept: those that no run holds.
        tokens: with keys and values; copies are not counted.
        kept_tokens, kept_bytes: of `kept`.
        demand: frees bytes for what does not wait in line; the admission's.
    """

    def __init__(self, memory: Memory, copy_bytes: int, keep: int) -> None:
        self.memory, self.keep = memory, keep
        self.arena = Arena(memory)
        self.root = NodeState(0, 0, [])
        self.runs: dict[int, Run] = {}
        self.sealed: dict[NodeState, None] = {}
        self.kept: dict[NodeState, None] = {}
        self.tokens = self.kept_tokens = self.kept_bytes = 0
        # In a slot of a windowed model stands nothing but the node itself: its positions are then consecutive.
        self._copy_bytes = 0 if memory.windows else copy_bytes
        self.demand: Callable[[int], None] = self.evict
        self._clock = 0
        self._serial = count(1)

    # -- what is known -------------------------------------------------------------------------------------------

    def learn(self, graph: ThreadGraph, nodes: Sequence[Snapshot], last: Snapshot | None = None) -> Run:
        """Take in nodes, or further tokens of nodes, of a run; `last` is to come after them (`open`)."""
        run = self.runs.get(id(graph))
        if run is None:
            run = self.runs[id(graph)] = Run(graph)
            run.states[self.root] = None
        ahead = _ahead([*nodes, last] if last is not None else nodes)
        for seen in nodes:
            place = run.nodes.get(seen.id)
            if place is None:
                place = run.nodes[seen.id] = self._place(run, seen)
            if new := seen.tokens[place.size :]:
                self._extend(run, place, new, ahead.get(seen.id, []))
        return run

    def open(self, run: Run, seen: Snapshot) -> NodeState | None:
        """The stretch that a generation in a node fills, with the forced tokens that are not in the cache's tree.

        Returns:
            None if the node is being filled already.
        """
        place = run.nodes.get(seen.id)
        if place is not None and place.pieces and place.pieces[-1].state.job is not None:
            return None
        self.learn(run.graph, [seen])
        # What was known before may be read by others, and is filled by whoever needs it first.
        if place is not None or not (pieces := run.nodes[seen.id].pieces) or pieces[-1].stop is not None:
            self._open(run, run.nodes[seen.id], [])
        return run.nodes[seen.id].pieces[-1].state

    def _place(self, run: Run, seen: Snapshot) -> Place:
        plain, tip = not seen.joined, (self.root, 0)
        if seen.parent is not None:
            parent, length = seen.parent
            plain = plain and run.nodes[parent].plain
            tip = run.nodes[parent].after(length)
        return Place(seen.start, seen.view, plain, tip)

    def _extend(self, run: Run, place: Place, tokens: list[int], ahead: list[int]) -> None:
        """Add tokens to a node: those that another run has are its own from now on, too.

        Where there are several paths with them, it takes the one on which the tokens `ahead` are found best.
        """
        if place.pieces and place.pieces[-1].stop is None:
            place.pieces[-1].state.tokens += tokens
            return
        at = 0
        if place.plain:
            for state, stop in radix.match(*place.end, tokens + ahead, run).steps:
                start = state.holders.get(run, 0)
                stop = min(stop, start + len(tokens) - at)
                if stop > start:
                    place.pieces.append(Piece(state, start, stop))
                    self._hold(run, state, stop)
                    at += stop - start
        if at < len(tokens):
            self._open(run, place, tokens[at:])

    def _open(self, run: Run, place: Place, tokens: Sequence[int]) -> None:
        """Begin a stretch at the end of a node."""
        place.close()
        state = NodeState(next(self._serial), place.start + place.size, list(tokens))
        if place.plain:
            state.parent, state.offset = place.end
            radix.attach(state)
        else:
            state.seen = run.context(place.view, place.pieces)
        self._hold(run, state, WHOLE)
        place.pieces.append(Piece(state, 0, None))

    def _hold(self, run: Run, state: NodeState, length: int) -> None:
        """A run needs so many tokens of a stretch; of one that was nobody's it gets no more than that."""
        kept = state in self.kept
        if kept:
            self._count_kept(state, -1)
            del self.kept[state]
        state.holders[run] = length
        run.states[state] = None
        if kept and length < len(state.tokens) and self.memory.left >= state.room * self.memory.token_bytes:
            self._cut(state, length)

    # -- keys and values -----------------------------------------------------------------------------------------

    def touch(self, context: Context) -> None:
        """These are wanted now: of what may be evicted they are the last."""
        self._clock += 1
        for state, _ in context:
            state.used = self._clock

    def reserve(self, state: NodeState, length: int) -> None:
        """Have a segment with room for `length` tokens."""
        if state.segment is None:
            state.segment = Segment(self.memory, length)
            self.sealed[state] = None
        elif state.segment.capacity < length:
            state.segment.grow(length, state.computed)

    def layout(self, job: Job, copy: bool = True) -> int:
        """Say which context is to stand in front of a job's tail, and which is read in place.

        Returns:
            The tokens that its slot must have room for.
        """
        job.copied, job.inplace = [], []
        token_bytes = self.memory.token_bytes // self.memory.layers
        room = self._copy_bytes // token_bytes if copy else 0
        for state, length in job.context:
            if length > room or in_place(length, state.readers, token_bytes, self._copy_bytes):
                job.inplace.append((state, length))
            else:
                job.copied.append((state, length))
                room -= length
        return sum(length for _, length in job.copied) + (job.pending is not None) + job.given + 1

    def place(self, job: Job) -> None:
        """Give a generation its slot; see `layout`."""
        head, state = list(job.copied), job.state
        if state.computed:  # a reader had some of its tokens computed; the last is fed again for logits
            job.fed = min(state.computed, job.given - 1)
            head.append((state, job.fed))
            self.tokens += job.fed  # `drop` below takes them off
        pieces = [other.reads(length) for other, length in head]
        slab = self.arena.place(job)
        tokens = sum(length for _, length in head)
        job.head = tokens - job.fed
        at = 0
        for (_, length), (keys, values) in zip(head, pieces, strict=True):
            slab.keys[:, job.slot, :, at : at + length] = keys
            slab.values[:, job.slot, :, at : at + length] = values
            at += length
        slab.used[job.slot] = tokens
        if job.pending is not None:
            slab.token[job.slot], slab.position[job.slot] = job.pending, state.start - 1
        self.drop(state)

    def inherit(self, job: Job) -> None:
        """The slot has fed the token before a generation's first: it is part of the head, and of its own stretch."""
        state, slab, at = job.heir, job.slab, job.head
        assert state is not None
        assert slab is not None
        if state.computed < state.room and state.computed == job.state.start - 1 - state.start:
            assert state.segment is not None
            state.segment.keys[:, :, state.computed] = slab.keys[:, job.slot, :, at]
            state.segment.values[:, :, state.computed] = slab.values[:, job.slot, :, at]
            state.computed += 1
        else:
            self.tokens -= 1  # a copy
        job.head += 1
        job.pending = job.heir = None

    def seal(self, job: Job) -> None:
        """Move what a generation computed from its slot to a segment of the stretch's size."""
        state = job.state
        segment = Segment(self.memory, len(state.tokens))
        if job.fed:
            keys, values = state.reads(job.fed)
            segment.keys[:, :, : job.fed] = keys
            segment.values[:, :, : job.fed] = values
        self.tokens += job.fed  # `leave` takes them off
        self.leave(job)
        state.segment = segment
        state.computed = job.fed
        self.sealed[state] = None

    def leave(self, job: Job) -> None:
        """Give a generation's slot back, with what is in it."""
        if job.slab is not None:
            self.tokens -= job.fed
        self.arena.leave(job)

    def drop(self, state: NodeState) -> None:
        """Give back a segment."""
        if state in self.kept:
            self._count_kept(state, -1)
            del self.kept[state]
        if state.segment is not None:
            state.segment.free()
            self.tokens -= state.computed
            state.segment, state.computed = None, 0
            del self.sealed[state]

    def spare(self, but: Iterable[NodeState] = ()) -> int:
        """Bytes that eviction can free, `but` what these hold."""
        but = set(but)
        return sum(s.segment.bytes for s in self.sealed if s.segment and not s.pinned and s not in but)

    def evict(self, need: int) -> None:
        """Drop what nobody reads until so many bytes are free: first of ended runs, then those last used first."""
        if self.memory.left >= need:
            return
        idle = [state for state in self.sealed if not state.pinned]
        for state in sorted(idle, key=lambda state: (bool(state.holders), state.used, -state.start)):
            if state in self.kept:
                self._forget(state)
            else:
                self.drop(state)
            if self.memory.left >= need:
                return

    # -- the end of a run ----------------------------------------------------------------------------------------

    def release(self, run: Run) -> None:
        """Forget a run. Of its ordinary stretches that no other run holds, as many stay as may be kept."""
        del self.runs[id(run.graph)]
        for state in run.states:
            state.holders.pop(run, None)
        for state in run.states:
            if state.parent is None:  # joined, or forgotten with what it hung on
                if state is not self.root:
                    self.drop(state)
                continue
            held = max(state.holders.values(), default=0)
            if held == 0:
                self._keep(state)
            elif held < len(state.tokens):
                self._cut(state, held)
        self.trim()

    def trim(self) -> None:
        """Keep no more of ended runs than may be."""
        if self.kept_bytes > self.keep:
            for state in sorted(self.kept, key=lambda state: (state.used, -state.start)):
                self._forget(state)
                if self.kept_bytes <= self.keep:
                    return

    def forget_kept(self) -> None:
        """Drop all that is kept of ended runs."""
        for state in list(self.kept):
            self._forget(state)

    def _keep(self, state: NodeState) -> None:
        """Nobody holds a stretch any more: what has keys and values may stay for a while."""
        if not self.keep or not state.computed:
            self._forget(state)
            return
        del state.tokens[state.computed :]
        for child in radix.children_of(state, state.computed):
            self._forget(child)
        self.kept[state] = None
        self._count_kept(state, 1)

    def _cut(self, state: NodeState, length: int) -> None:
        """Part a stretch from the tokens behind those that are held."""
        tail = radix.split(state, length, next(self._serial))
        tail.used = state.used
        old, over = state.segment, max(0, state.computed - length)
        if old is not None and old.capacity > length:
            # The parts are copies; where there is no memory for them, the keys and values go, or stay in one piece.
            token = self.memory.token_bytes
            if over and self.keep and self.memory.left >= (length + over) * token:
                self.reserve(tail, over)
                assert tail.segment is not None
                tail.segment.keys[:] = old.keys[:, :, length : length + over]
                tail.segment.values[:] = old.values[:, :, length : length + over]
                tail.computed = over
                self.tokens += over
            if self.memory.left >= length * token:
                segment = Segment(self.memory, length)
                segment.keys[:] = old.keys[:, :, :length]
                segment.values[:] = old.values[:, :, :length]
                old.free()
                state.segment = segment
            elif not state.pinned:
                self.drop(state)
            self.tokens -= min(over, state.computed)
            state.computed = min(length, state.computed)
        self._keep(tail)

    def _forget(self, state: NodeState) -> None:
        """Drop a stretch that nobody holds, and all that hangs on it."""
        gone = [state, *radix.below(state)]
        if state.parent is not None:
            radix.detach(state)
        for each in gone:
            self.drop(each)
            each.parent, each.branches = None, {}

    def forget(self, run: Run, nodes: Iterable[int]) -> None:
        """Drop what nodes have that nobody reads, or is about to."""
        for i in nodes:
            for piece in run.nodes[i].pieces if i in run.nodes else ():
                state = piece.state
                if not state.readers and state.job is None and set(state.holders) <= {run}:
                    self.drop(state)

    def _count_kept(self, state: NodeState, sign: int) -> None:
        assert state.segment is not None
        self.kept_tokens += sign * state.computed
        self.kept_bytes += sign * state.segment.bytes

    # -- readers -------------------------------------------------------------------------------------------------

    def pin(self, work: Job | Score) -> None:
        """Keep what it reads until `unpin`."""
        work.admitted = True
        for state, _ in work.context:
            state.pinned += 1

    def hold(self, context: Context) -> None:
        """Have room for what a gang reads, and keep it until `let_go`."""
        self.touch(context)
        for state, length in context:
            if not state.growing and state.room < length:
                self.demand(length * self.memory.token_bytes)
                self.reserve(state, length)
            state.readers += 1
            state.pinned += 1

    def let_go(self, context: Context) -> None:
        """Undo `hold`."""
        for state, _ in context:
            state.readers -= 1
            state.pinned -= 1

    def unpin(self, work: Job | Score) -> None:
        """Undo `pin`; does nothing to what waits in line."""
        if work.admitted:
            work.admitted = False
            self.touch(work.context)
            for state, _ in work.context:
                state.pinned -= 1


def _ahead(nodes: Sequence[Snapshot]) -> dict[int, list[int]]:
    """For the nodes on the way to the last: the tokens that come after them."""
    found: dict[int, list[int]] = {}
    known = {seen.id: seen for seen in nodes}
    seen, tokens = (nodes[-1], nodes[-1].tokens) if nodes else (None, [])
    while seen is not None and seen.parent is not None and not seen.joined:
        parent, length = seen.parent
        seen = known.get(parent)
        if seen is None or len(seen.tokens) != length:
            break
        found[parent] = tokens
        tokens = seen.tokens + tokens
    return found
