"""Majority vote over answers."""

from __future__ import annotations

from collections.abc import Sequence

from orchestra.outcome import Candidate


def same_answer(answer: str | None) -> str | None:
    """The form in which answers are compared: white space and case do not matter."""
    return " ".join(answer.split()).casefold() if answer is not None else None


def majority(candidates: Sequence[Candidate]) -> int:
    """Index of the first candidate that has the answer with the largest total weight.

    Candidates without an answer have no vote; if none has one, the heaviest candidate is taken. Ties go to the answer
    that came first.
    """
    votes: dict[str, float] = {}
    for candidate in candidates:
        if (answer := same_answer(candidate.answer)) is not None:
            votes[answer] = votes.get(answer, 0.0) + candidate.weight
    if not votes:
        return max(range(len(candidates)), key=lambda i: candidates[i].weight)
    winner = max(votes, key=lambda answer: votes[answer])
    return next(i for i, candidate in enumerate(candidates) if same_answer(candidate.answer) == winner)
