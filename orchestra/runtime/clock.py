"""The clock a run lives by: the real one, or a simulated one that waits for nobody.

A run has one clock, and everything that reads the time (budgets, races, the graph's seconds, usage) reads that one.
A simulated clock stands still while anything of the program can go on and jumps to the next event when nothing can, so
hours of recorded decoding pass in milliseconds and come out to the token.
"""

from __future__ import annotations

import abc
import asyncio
import heapq
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from dataclasses import dataclass, field
from itertools import count


class Clock(abc.ABC):
    """What time it is, and how to stop what takes too long."""

    @abc.abstractmethod
    def now(self) -> float:
        """Seconds since some fixed moment."""

    @abc.abstractmethod
    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Cancel the body after so many seconds of this clock (None: never); like `asyncio.timeout`.

        Raises:
            TimeoutError: the time was over. What ends at the very deadline has ended in time.
        """

    @abc.abstractmethod
    def held(self) -> AbstractContextManager[None]:
        """While the body runs, something real is waited for: a simulated clock does not go on."""


class RealClock(Clock):
    """The monotonic clock of the machine."""

    def now(self) -> float:
        """See `Clock.now`."""
        return time.monotonic()

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """See `Clock.timeout`."""
        return asyncio.timeout(seconds)

    def held(self) -> AbstractContextManager[None]:
        """See `Clock.held`: real time cannot be held."""
        return nullcontext()


REAL = RealClock()


@dataclass(order=True, slots=True)
class Timer:
    """Something scheduled on a simulated clock.

    Attributes:
        when: seconds, as of `Clock.now`.
        last: after everything else of that moment.
        sequence: the order of what is scheduled for the same moment.
        callback: what happens then; None once it has, or was cancelled.
    """

    when: float
    last: bool
    sequence: int
    callback: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        """Forget it; idempotent."""
        self.callback = None


class SimulatedClock(Clock):
    """A clock that starts at 0 and advances only when every task of the event loop waits.

    Events happen one by one: what one of them sets off comes to rest before the next, even at the same moment.
    Nothing real is waited for, so whoever awaits something real (another engine, a thread, `asyncio.sleep`) and wants
    the time to stand still meanwhile does so in `held()`. Clocks that share an event loop are independent.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[Timer] = []
        self._sequence = count()
        self._holds = 0

    def now(self) -> float:
        """Simulated seconds since the clock was made."""
        return self._now

    def call_at(self, when: float, callback: Callable[[], None], *, last: bool = False) -> Timer:
        """Call `callback` at `when` (at once, but not before this returns, if that is over).

        Args:
            when: seconds, as of `now`.
            callback: what to call, on the event loop.
            last: after everything else that is scheduled for the same moment.
        """
        timer = Timer(max(when, self._now), last, next(self._sequence), callback)
        heapq.heappush(self._timers, timer)
        _Pump.here().add(self)
        return timer

    @asynccontextmanager
    async def timeout(self, seconds: float | None) -> AsyncIterator[asyncio.Timeout]:
        """See `Clock.timeout`."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as timer:
            if seconds is None:
                yield timer
                return
            deadline = self.call_at(self._now + seconds, lambda: timer.reschedule(loop.time()), last=True)
            try:
                yield timer
            finally:
                deadline.cancel()

    @contextmanager
    def held(self) -> Iterator[None]:
        """See `Clock.held`; may be nested."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._timers:
                _Pump.here().add(self)

    def _advance(self) -> bool:
        """Let the next event happen, if there is one; whether there is another."""
        if self._waits():
            timer = heapq.heappop(self._timers)
            callback, timer.callback = timer.callback, None
            self._now = timer.when
            assert callback is not None  # those are dropped
            callback()
        return self._waits()

    def _waits(self) -> bool:
        """Whether there is an event that may happen."""
        while self._timers and self._timers[0].callback is None:
            heapq.heappop(self._timers)
        return bool(self._timers) and not self._holds


class _Pump:
    """Lets time pass on the simulated clocks of one event loop, whenever the loop has nothing else to do.

    One for all clocks, because each would take the others for something that is still going on. It sits in the loop's
    queue only while an event is scheduled.
    """

    MOST_HOPS = 1000
    """Turns of a loop that never rests (somebody polls with `sleep(0)`) after which time passes all the same."""

    BLIND_HOPS = 100
    """Turns after which the program is taken to rest on a loop that does not tell (uvloop)."""

    def __init__(self) -> None:
        self._clocks: dict[SimulatedClock, None] = {}  # a set that keeps its order
        self._queued = False
        self._hops = 0

    @classmethod
    def here(cls) -> _Pump:
        """The pump of the running event loop."""
        return _PUMPS.setdefault(asyncio.get_running_loop(), cls())

    def add(self, clock: SimulatedClock) -> None:
        """`clock` may have something to do."""
        self._clocks[clock] = None
        self._queue()

    def _queue(self) -> None:
        if self._clocks and not self._queued:
            self._queued = True
            asyncio.get_running_loop().call_soon(self._hop)

    def _hop(self) -> None:
        self._queued = False
        self._hops += 1
        try:
            if self._at_rest():
                self._hops = 0
                for clock in list(self._clocks):
                    if not clock._advance():
                        del self._clocks[clock]
        finally:
            self._queue()

    def _at_rest(self) -> bool:
        waiting = _waiting(asyncio.get_running_loop())
        return waiting == 0 or self._hops >= (self.BLIND_HOPS if waiting is None else self.MOST_HOPS)


_PUMPS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Pump] = weakref.WeakKeyDictionary()


def _waiting(loop: asyncio.AbstractEventLoop) -> int | None:
    """Callbacks that the loop is about to run; None if it does not tell."""
    ready = getattr(loop, "_ready", None)
    return None if ready is None else len(ready)
