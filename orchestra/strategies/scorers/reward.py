"""Candidates by a function of their text."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, cast

from orchestra.errors import UsageError
from orchestra.group import gather
from orchestra.outcome import Candidate
from orchestra.strategies.scorers.base import Scorer

if TYPE_CHECKING:
    from orchestra.thread import Thread

RewardFunction = Callable[[str], float] | Callable[[str], Awaitable[float]]


class Reward(Scorer):
    """A function of the response text; `best_of(reward=...)` makes one. Python only: no spec can hold it.

    Attributes:
        function: plain, or a coroutine function. A plain one is called as each candidate is drawn; a coroutine
            function when all are, on all side by side.
    """

    abstract = True

    function: RewardFunction

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        """The rewards; those of a plain function are the weights already."""
        if not self._waits:
            return [candidate.weight for candidate in candidates]
        function = cast(Callable[[str], Awaitable[float]], self.function)

        async def one(candidate: Candidate) -> float:
            return float(await function(candidate.text))

        with thread._run.clock.held():  # what it waits for is real, whatever clock the engine lives by
            return await gather([one(candidate) for candidate in candidates])

    def weigh(self, candidate: Candidate) -> float:
        """The reward, if it is there at once."""
        if self._waits:
            return 1.0
        value = self.function(candidate.text)
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise UsageError("a reward function that has to be awaited is defined with 'async def'")
        return float(value)

    @property
    def _waits(self) -> bool:
        call = getattr(self.function, "__call__", None)  # noqa: B004 (an object's own, which may be a coroutine function)
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)
