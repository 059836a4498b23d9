"""What all strategies share whose result is one thread that grows turn by turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestra.outcome import Candidate
from orchestra.strategies.base import Strategy
from orchestra.thread import BudgetCut, Thread


class OneThread(Strategy):
    """Turn by turn the thread is offered as it is, so that a budget that ends leaves all that was written by then."""

    abstract = True

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The last: all are one and the same thread."""
        return len(candidates) - 1


async def turn(thread: Thread, **sampling: Any) -> Thread:
    """Generate, and offer what there is of it, also when a budget ends it."""
    try:
        grown = await thread.generate(**sampling)
    except BudgetCut as cut:
        if cut.thread is not thread:  # else there was nothing left to begin with
            thread.offer(cut.thread.candidate())
        raise
    thread.offer(grown.candidate())
    return grown
