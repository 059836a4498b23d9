"""Votes over answers, and when a vote is decided."""

from __future__ import annotations

from collections.abc import Sequence

from orchestra.outcome import Candidate


def same_answer(answer: str | None) -> str | None:
    """The form in which answers are compared: white space and case do not matter."""
    return " ".join(answer.split()).casefold() if answer is not None else None


def tally(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Total weight of each answer, in the order in which they came. Without an answer or a weight there is no vote."""
    votes: dict[str, float] = {}
    for candidate in candidates:
        answer = same_answer(candidate.answer)
        if answer is not None and candidate.weight > 0:
            votes[answer] = votes.get(answer, 0.0) + candidate.weight
    return votes


def majority(candidates: Sequence[Candidate]) -> int:
    """Index of the first candidate that voted for the answer with the largest total weight.

    If none has a vote, the heaviest candidate is taken. Ties go to the answer that came first.
    """
    votes = tally(candidates)
    if not votes:
        return max(range(len(candidates)), key=lambda i: candidates[i].weight)
    winner = max(votes, key=lambda answer: votes[answer])
    return next(i for i, c in enumerate(candidates) if same_answer(c.answer) == winner and c.weight > 0)


def unanimous(candidates: Sequence[Candidate]) -> bool:
    """Whether all have an answer, and the same one."""
    answers = {same_answer(candidate.answer) for candidate in candidates}
    return len(answers) == 1 and None not in answers


def lead_certainty(first: int, second: int) -> float:
    """Chance that the answer with `first` votes is the more likely of two, given `second` <= `first` for the other.

    Under a uniform prior on its share the posterior is Beta(first + 1, second + 1); this is its mass above one half
    (Aggarwal et al. 2023, arXiv 2305.11860, the Beta criterion). For whole numbers that mass is a binomial
    tail: that of more than `second` heads in first + second + 1 throws of a fair coin.
    """
    throws = first + second + 1
    below = ways = 1
    for heads in range(second):
        ways = ways * (throws - heads) // (heads + 1)
        below += ways
    return ((1 << throws) - below) / (1 << throws)  # exact up to the division
