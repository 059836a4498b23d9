"""CHOPS: one judge call writes a checklist, and picks by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from orchestra.outcome import Candidate
from orchestra.strategies.scorers.asking import AskingScorer, best_in, exhibits, shuffles
from orchestra.strategies.scorers.base import solution

if TYPE_CHECKING:
    from orchestra.thread import Thread

_PICK = """Pick the best of the responses to the question above.

First write a short checklist of what a good response to this very question must do. Then go through the responses and
check each against the list. Last, on a line of its own, name the one that does best, in this form:

Best: Response NUMBER"""


class Checklist(AskingScorer):
    """CHOPS: one call sees all candidates, writes a checklist and picks one; without a pick the vote decides."""

    paper = "Khairi et al. 2025, arXiv 2506.20544"

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        """1 for the one picked, 0 for the others."""
        scores = [0.0] * len(candidates)
        if len(candidates) == 1:
            return [1.0]
        (order,) = shuffles(thread, 1, len(candidates))
        responses = [solution(candidates[index]) for index in order]

        def hear(_: int, reply: str) -> None:
            if (number := best_in(reply, len(candidates))) is not None:
                scores[order[number - 1]] = 1.0

        await self.ask(thread, [f"{exhibits(thread.prompt, responses, self.max_chars)}\n\n{_PICK}"], hear)
        return scores
