"""Potentials: what the score of a text that still grows is worth to a particle filter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from orchestra.errors import UsageError
from orchestra.outcome import Candidate
from orchestra.strategies.scorers import Reward, Scorer
from orchestra.strategies.scorers.base import LOWEST, tell

if TYPE_CHECKING:
    from orchestra.thread import Thread

Potential = Literal["odds", "exp", "score"]
_SURE = 1e-7  # odds are those of a score from here to as much below 1: none is zero, none is infinite


def log_potential(score: float, potential: Potential) -> float:
    """The logarithm of what a score is worth: `odds` s / (1 - s), `exp` e^s, or the `score` s itself.

    Raises:
        UsageError: a score outside 0..1 has no odds, one below 0 is no potential.
    """
    if potential == "odds":
        if not 0 <= score <= 1:
            raise UsageError(f"a score of {score:g} has no odds (0 to 1 have); potential='exp' takes any")
        score = min(max(score, _SURE), 1 - _SURE)
        return math.log(score) - math.log1p(-score)
    if potential == "exp":
        return score if score > LOWEST else -math.inf
    if score < 0:
        raise UsageError(f"a score of {score:g} is no potential: 0 or more is; potential='exp' takes any")
    return math.log(score) if score else -math.inf


async def log_potentials(
    thread: Thread, candidates: Sequence[Candidate], scorer: Scorer, potential: Potential
) -> list[float]:
    """The logarithms of the potentials of some texts. Their weights are the scorer's to write to: give it copies.

    Raises:
        UsageError: see `log_potential`; or the scorer gave another number of scores.
    """
    if not candidates:
        return []
    tell(candidates, [scorer.weigh(candidate) for candidate in candidates])
    scores = await scorer(thread, candidates)
    if len(scores) != len(candidates):
        raise UsageError(f"{scorer.name} gave {len(scores)} scores for {len(candidates)} candidates")
    return [log_potential(score, potential) for score in scores]


def compares(scorer: Scorer) -> bool:
    """Whether a text's score may depend on the others that it is shown with."""
    return type(scorer).__call__ is not Scorer.__call__ and not isinstance(scorer, Reward)
