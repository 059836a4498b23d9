"""What a scorer is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BeforeValidator, SerializeAsAny

from orchestra.answers import split_reasoning
from orchestra.outcome import Candidate
from orchestra.spec import Named

if TYPE_CHECKING:
    from orchestra.thread import Thread

LOWEST = -sys.float_info.max
"""The score of what cannot be scored: the last in line, and a number in JSON too."""


class Scorer(Named):
    """Scores for the candidates of one question: parameters as fields, and one coroutine.

    Subclasses are registered under the class name in snake case, and can then be named in specs
    (one that sets `abstract = True` for itself is not). Override `__call__`; or `weigh`, if a candidate's score has
    nothing to do with the others.

    Attributes:
        name: its name in specs.
        needs: what the engine that draws the candidates must be able to do.
        paper: where it comes from.
    """

    kind = "scorer"
    example = "judge(samples=4)"
    abstract = True

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        """One score for each of at least one candidate, higher is better; equal scores leave the choice to a vote.

        Args:
            thread: the thread that the candidates were drawn from; other generations are spawned from it.
            candidates: those to score. A scorer that learns about all of them step by step may set their weights as
                it goes (see `tell`): by these the best is chosen if a budget ends it.
        """
        return [self.weigh(candidate) for candidate in candidates]

    def weigh(self, candidate: Candidate) -> float:
        """What a candidate counts for as soon as it is drawn: by this the best is chosen if a budget ends the drawing.

        By default all count the same.
        """
        return 1.0


ScorerField = Annotated[SerializeAsAny[Scorer], BeforeValidator(Scorer.parse)]


def tell(candidates: Sequence[Candidate], scores: Sequence[float]) -> None:
    """Make scores the candidates' weights. What is no number is the lowest there is; infinities become finite."""
    for candidate, score in zip(candidates, scores, strict=True):
        candidate.weight = max(LOWEST, min(float(score), -LOWEST)) if score == score else LOWEST


def solution(candidate: Candidate) -> str:
    """What a candidate says when it has finished thinking."""
    return split_reasoning(candidate.text).solution.strip()
