"""Who may hold memory: generations and scorings get in in order of arrival, and give way, the youngest first.

What is admitted has the memory that it needs now: a slot, and segments for the context that has to be computed; what it
reads is pinned. What waits holds nothing. A generation whose slot is full needs a larger one: if there is no memory for
it, even after all that nobody reads has been evicted, the youngest is *preempted*, which may be that generation itself.
It keeps its tokens, waits in line at its place, and goes on by computing them again.

This cannot deadlock. A stretch is read only by work that came after the generation that fills it, so the youngest has
no reader, and the oldest is never preempted for another but by the end of one that it reads. When nothing else is
admitted everything else can be evicted; what does not fit then is refused. Members of a gang do not
give way, because what they have read was there only once, nor do those of a lock-step group, for which the others would
wait; a gang that is too large for the limit alone exceeds it, a group is refused as a whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from heapq import merge
from itertools import count, islice

from orchestra.errors import EngineError
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.nodes import Context
from orchestra.runtime.local.segments import Segment

Work = Job | Score


class Admission:
    """The line, and what has left it.

    Args:
        cache: whose memory it is about.
        max_batch: most generations admitted.
        refuse: called with what can never fit, and the reason.

    Attributes:
        waiting: generations that are not admitted, in order of arrival.
        scores: all scorings, in order of arrival.
        entering: admitted generations without a slot: context of theirs is to be computed.
        admitted: all work that is.
        changed: slots or segments have moved, come or gone; whoever looks sets it back.
    """

    def __init__(self, cache: Cache, max_batch: int, refuse: Callable[[Work, EngineError], None]) -> None:
        self.cache, self.memory, self.arena = cache, cache.memory, cache.arena
        self.max_batch = max_batch
        self.waiting: dict[Job, None] = {}
        self.scores: list[Score] = []
        self.entering: dict[Job, None] = {}
        self.admitted: dict[Work, None] = {}
        self.changed = False
        self._refuse = refuse
        self._numbers = count()

    def arrive(self, work: Work) -> None:
        """Put work at the end of the line."""
        work.number = next(self._numbers)
        for state, _ in work.context:
            state.readers += 1
        self.cache.touch(work.context)
        if isinstance(work, Job):
            self.waiting[work] = None
        else:
            self.scores.append(work)

    def leave(self, work: Work) -> None:
        """Take work out, wherever it is; what a generation computed is sealed, if there is memory or a reader."""
        self.changed = True
        self.cache.unpin(work)
        self.admitted.pop(work, None)
        for state, _ in work.context:
            state.readers -= 1
        if isinstance(work, Score):
            self.scores.remove(work)
            self._scrap(work)
            return
        self.waiting.pop(work, None)
        self.entering.pop(work, None)
        state = work.state
        if (work.slab is not None and (work.fed or work.group is not None)) or state.pinned:
            size = len(state.tokens) * self.memory.token_bytes
            while not (found := self._find(lambda: size)) and state.pinned:
                victim = self._youngest()
                if victim is None:  # a gang reads it: its keys cannot be computed again, and must stay
                    found = True
                    break
                self._preempt(victim)
            if found and work.slab is not None:
                self.cache.seal(work)
            elif state.pinned:
                self.cache.reserve(state, len(state.tokens))
        self.cache.leave(work)
        state.job = None

    def admit(self) -> None:
        """Let work in, as long as there is memory and, for generations, room in the batch."""
        scores = [score for score in self.scores if not score.admitted]
        line: Iterator[Work] = merge(self._next(), scores, key=lambda work: work.number)
        for work in line:
            need = self._enter(work)
            if need and self._youngest() is not None:
                return  # those that are in will end, and free what they hold
            if need and self.admitted and not (isinstance(work, Job) and work.team is not None):
                return  # teams are in
            if need:
                what = "a generation" if isinstance(work, Job) else "a scoring"
                error = f"{what} needs {need} bytes of keys and values for itself; the limit is {self.memory.limit}"
                self._refuse(work, EngineError(f"{error} (memory=)"))

    def _next(self) -> list[Job]:
        """The generations for which there is room in the batch; a team comes in as a whole."""
        inside = [work for work in self.admitted if isinstance(work, Job)]
        teams = {job.team for job in inside if job.team is not None}
        free = self.max_batch - sum(job.team is None for job in inside) - sum(team.members for team in teams)
        if not any(job.team is not None for job in self.waiting):
            return list(islice(self.waiting, max(0, free)))
        found = [job for job in self.waiting if job.team in teams]  # the others of their team wait for them
        early = set(found)
        for job in self.waiting:
            if job.team is None:
                free -= 1
            elif job.team not in teams:
                free -= job.team.members
                teams.add(job.team)
            elif job in early:
                continue
            if free < 0:
                break
            found.append(job)
        return sorted(found, key=lambda job: job.number)

    def grow(self) -> None:
        """Move generations whose slot is full to larger ones; for those that find no memory the youngest give way."""
        for job in sorted(self.arena.full(), key=lambda job: job.number):
            # It may have given way, to an older one or because it is the youngest; or its gang has moved.
            while (slab := job.slab) is not None and slab.used[job.slot] >= slab.capacity:
                capacity = self.arena.capacity(slab.capacity + 1)
                need = partial(self.arena.growth, slab, capacity)
                if self._find(need):
                    self.changed = True
                    if slab.gang is not None:
                        self.arena.enlarge(slab, capacity, slab.taken)
                    else:
                        self.arena.reserve(job, capacity)
                        self.arena.move(job)
                elif (victim := self._youngest()) is not None:
                    self._preempt(victim)
                else:
                    error = f"generations in lock-step need {need()} bytes more of keys and values"
                    self._refuse(job, EngineError(f"{error}; the limit is {self.memory.limit} (memory=)"))

    def demand(self, need: int) -> None:
        """Free so many bytes for a gang, which does not wait; between two steps. If all others are out, that is all."""
        while not self._find(lambda: need) and (victim := self._youngest()) is not None:
            self._preempt(victim)

    def _enter(self, work: Work) -> int:
        """Admit work; returns 0, or how many bytes it needs if there are not so many."""
        self.cache.touch(work.context)
        if isinstance(work, Score):
            cost = partial(self._cost, work, 0)
            found = self._find(cost, work)
        else:
            work.given = len(work.state.tokens)
            for copy in (True, False):  # where memory is short, nothing is copied
                capacity = self.arena.capacity(self.cache.layout(work, copy), work.gang)
                cost = partial(self._cost, work, capacity)
                if found := self._find(cost, work):
                    break
        if not found and not self.admitted:
            self.cache.evict(sys.maxsize)  # its own context, too, if that is half computed
            found = self._find(cost)
        if not found:
            return cost()
        for state, length in self._missing(work):
            self.cache.reserve(state, length)
        if isinstance(work, Score):
            work.segment = Segment(self.memory, len(work.tokens))
        else:
            self.arena.reserve(work, capacity)
            del self.waiting[work]
            self.entering[work] = None
        self.cache.pin(work)
        self.admitted[work] = None
        self.changed = True
        return 0

    def _missing(self, work: Work) -> Context:
        return [(state, n) for state, n in work.context if not state.growing and state.room < n]

    def _cost(self, work: Work, capacity: int) -> int:
        """Bytes that must be free to admit work."""
        tokens = sum(length for _, length in self._missing(work))
        if isinstance(work, Score):
            tokens += len(work.tokens)
            return tokens * self.memory.token_bytes
        return tokens * self.memory.token_bytes + self.arena.cost(capacity, work.gang)

    def _find(self, need: Callable[[], int], work: Work | None = None) -> bool:
        """Free so many bytes without taking from what is admitted, nor the context of `work`."""
        if self.memory.left >= need():
            return True
        own = [state for state, _ in work.context] if work is not None else []
        spare = self.cache.spare(own)
        for make_room in (self.arena.trim, self.arena.shrink):
            make_room()
            self.changed = True
            if self.memory.left + spare >= need():
                self.cache.evict(need())
                return True
        return False

    def _youngest(self) -> Work | None:
        """Who gives way next. Members of a team do not: the others would wait for them."""
        able = [work for work in self.admitted if isinstance(work, Score) or work.team is None]
        return max(able, key=lambda work: work.number, default=None)

    def _preempt(self, work: Work) -> None:
        """Send work back to its place in the line; of what it computed only the tokens stay."""
        self.changed = True
        del self.admitted[work]
        self.cache.unpin(work)
        if isinstance(work, Score):
            self._scrap(work)
            work.fed, work.result = 0, []
            return
        self.cache.leave(work)
        work.fed = 0
        self.entering.pop(work, None)
        line = sorted([*self.waiting, work], key=lambda job: job.number)
        self.waiting.clear()
        self.waiting.update(dict.fromkeys(line))

    def _scrap(self, score: Score) -> None:
        if score.segment is not None:
            score.segment.free()
            score.segment = None
