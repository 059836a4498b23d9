"""The invariants of the cache as code: what must hold between any two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from orchestra.runtime.local import radix
from orchestra.runtime.local.admission import Admission
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.gang import LocalGang
from orchestra.runtime.local.jobs import Job
from orchestra.runtime.local.nodes import WHOLE, NodeState, Run


def check_integrity(cache: Cache, admission: Admission, gangs: Collection[LocalGang] = ()) -> None:
    """Compare every counter with what it counts, and every link with its other end.

    Raises:
        AssertionError: one line that says what is wrong.
    """
    states = _known(cache)
    _check_memory(cache, admission, states, gangs)
    _check_slots(cache, admission)
    _check_readers(admission, states, gangs)
    _check_tree(cache, states)
    for run in cache.runs.values():
        _check_run(run)


def _known(cache: Cache) -> dict[NodeState, None]:
    """All stretches, by whatever holds them."""
    found = dict.fromkeys(radix.below(cache.root))
    for run in cache.runs.values():
        found |= run.states
    found.pop(cache.root, None)
    return found


def _check_memory(
    cache: Cache, admission: Admission, states: dict[NodeState, None], gangs: Collection[LocalGang]
) -> None:
    memory, slabs = cache.memory, cache.arena.slabs.values()
    sealed = {state for state in states if state.segment is not None}
    assert sealed == set(cache.sealed), "stretches with segments are not those that are listed, or are unknown"
    held = sum(state.segment.bytes for state in sealed if state.segment is not None)
    held += sum(score.segment.bytes for score in admission.scores if score.segment is not None)
    held += sum(slab.keys.nbytes + slab.values.nbytes for slab in slabs)
    held += sum(gang.memory for gang in gangs)
    assert held == memory.bytes, f"{memory.bytes} bytes are counted, {held} are held"
    assert memory.left >= 0 or gangs, f"{memory.bytes} bytes, the limit is {memory.limit}"
    tokens = sum(state.computed for state in states) + sum(job.fed for slab in slabs for job in slab.jobs)
    tokens += sum(gang.tokens for gang in gangs)
    assert tokens == cache.tokens, f"{cache.tokens} tokens are counted, {tokens} have keys and values"
    for state in states:
        assert 0 <= state.computed <= len(state.tokens), f"stretch {state.id} has more keys than tokens"
        assert state.computed <= state.room, f"stretch {state.id} has more keys than room for them"
        job = state.job
        assert job is None or job.state is state, f"stretch {state.id} is filled by a job that fills another"
        assert state.segment is None or job is None or job.slab is None, f"stretch {state.id} is in slot and segment"
        assert (state in cache.kept) == (not state.holders), f"stretch {state.id} is kept and held, or neither"
    kept = [state for state in cache.kept if state.segment is not None]
    assert len(kept) == len(cache.kept), "a stretch without keys and values is kept"
    assert sum(state.computed for state in kept) == cache.kept_tokens, "kept tokens are miscounted"
    assert sum(state.segment.bytes for state in kept if state.segment) == cache.kept_bytes, "kept bytes are miscounted"
    assert cache.kept_bytes <= cache.keep, f"{cache.kept_bytes} bytes are kept, {cache.keep} may be"


def _check_slots(cache: Cache, admission: Admission) -> None:
    reserved = Counter(cache.arena.reserved(job) for job in admission.entering)
    for (capacity, gang), slab in cache.arena.slabs.items():
        assert (slab.capacity, slab.gang) == (capacity, gang), "a slab is filed under another capacity"
        assert gang is None or gang.slab is slab or not slab.taken, "a gang is in two slabs"
        assert slab.reserved == reserved[slab], f"{slab.reserved} slots are reserved for {reserved[slab]} jobs"
        assert slab.taken <= slab.slots == slab.keys.shape[1] == len(slab.used), "more slots are taken than there are"
        for slot, job in enumerate(slab.jobs):
            assert job.slab is slab, "a job is in another slab than its own"
            assert job.slot == slot, f"the job in slot {slot} takes itself to be in {job.slot}"
            assert job.admitted, "a job has a slot and is not admitted"
            assert job.head + job.fed == slab.used[slot] <= capacity, "a slot holds other tokens than its job says"
            assert job.fed <= len(job.state.tokens), "a slot holds more tokens than are known"
    slots = sum(len(slab.jobs) for slab in cache.arena.slabs.values())
    jobs = [work for work in admission.admitted if isinstance(work, Job)]
    assert len(jobs) == slots + len(admission.entering), "an admitted job is neither in a slot nor about to get one"
    assert len(jobs) <= admission.max_batch, "more jobs are admitted than the batch may have"
    for job in admission.waiting:
        idle = not job.admitted and job.slab is None and job.reserved is None
        assert idle, "a job that waits in line holds memory"
    numbers = [job.number for job in admission.waiting]
    assert numbers == sorted(numbers), "the line is out of order"


def _check_readers(admission: Admission, states: dict[NodeState, None], gangs: Collection[LocalGang]) -> None:
    readers = Counter(state for gang in gangs for state in gang.holds())
    pinned = readers.copy()
    scores = dict.fromkeys(admission.scores)
    for work in [*admission.admitted, *admission.waiting, *(score for score in scores if not score.admitted)]:
        assert work.admitted == (work in admission.admitted), "admitted work is not among the admitted"
        for state, length in work.context:
            assert state in states, f"stretch {state.id} is read and unknown"
            assert length <= len(state.tokens), f"more tokens of stretch {state.id} are read than are known"
            readers[state] += 1
            pinned[state] += work.admitted
            ready = state.growing or state.room >= length or not work.admitted
            assert ready, f"there is no room for stretch {state.id}, which is read"
            filler = state.job
            assert filler is None or filler.number < work.number, "older work reads what younger work fills"
    for state in states:
        assert state.readers == readers[state], f"stretch {state.id} counts {state.readers} readers of {readers[state]}"
        assert state.pinned == pinned[state], f"stretch {state.id} counts {state.pinned} pins of {pinned[state]}"


def _check_tree(cache: Cache, states: dict[NodeState, None]) -> None:
    assert not cache.root.tokens, "the root is no stretch"
    inside = set()
    for parent in [cache.root, *radix.below(cache.root)]:
        for offset, first, child in _children(parent):
            inside.add(child)
            assert child.parent is parent, f"stretch {child.id} hangs where it does not say"
            assert child.offset == offset, f"stretch {child.id} hangs where it does not say"
            assert 0 < offset <= len(parent.tokens) or parent is cache.root, f"stretch {child.id} hangs on nothing"
            assert child.start == parent.start + offset, f"stretch {child.id} starts elsewhere"
            right = first == radix.NOTHING or (child.tokens and child.tokens[0] == first)
            assert right, f"stretch {child.id} is filed under another token"
            for run in child.holders:
                above = parent is cache.root or parent.holders.get(run, 0) >= offset
                assert above, f"a run holds stretch {child.id} and not what it goes on from"
    for state in states:
        assert (state.parent is not None) == (state in inside), f"stretch {state.id} is in the tree, or not, wrongly"


def _children(state: NodeState) -> Iterator[tuple[int, int, NodeState]]:
    for offset, groups in state.branches.items():
        for first, group in groups.items():
            for child in group:
                yield offset, first, child


def _check_run(run: Run) -> None:
    """Every token that a run holds belongs to exactly one of its nodes."""
    owned: dict[NodeState, list[tuple[int, int]]] = {}
    for place in run.nodes.values():
        position = place.start
        for piece in place.pieces:
            state = piece.state
            assert run in state.holders, f"a node lies in stretch {state.id}, which its run does not hold"
            assert state.start + piece.start == position, f"a node is at another position than stretch {state.id}"
            assert place.plain == (state.parent is not None), f"stretch {state.id}: joined and in the tree, or neither"
            position += piece.end - piece.start
            owned.setdefault(state, []).append((piece.start, piece.end))
    for state, parts in owned.items():
        at = 0
        for start, end in sorted(parts):
            assert start == at, f"tokens of stretch {state.id} belong to two nodes of a run, or to none"
            at = end
        length = state.holders[run]
        assert at == (len(state.tokens) if length == WHOLE else length), f"stretch {state.id} is held to another length"
