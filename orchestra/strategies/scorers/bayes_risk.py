"""Minimum Bayes risk: the candidate that the others agree with most."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import fsum
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from orchestra.outcome import Candidate
from orchestra.strategies.prompts import followed_by
from orchestra.strategies.scorers.asking import AskingScorer, rating_in, shortened, task
from orchestra.strategies.scorers.base import solution
from orchestra.strategies.voting import same_answer

if TYPE_CHECKING:
    from orchestra.thread import Thread

_RATE = """How good is the response to the question above? The reference is another response to it, perhaps in another
language, and perhaps wrong; it tells what others found. Weigh in a few sentences what the two have in common and where
they differ, then end with one line that gives the response a whole number from 1 (worst) to 10 (best), in this form:

Score: NUMBER"""

_EVIDENCE_TEMPERATURE = 0.7  # as hedged sampling, which the paper draws its pools with


class BayesRisk(AskingScorer):
    """Minimum Bayes risk: the mean utility of a candidate, measured against all the others.

    Attributes:
        utility: `exact`: the answers are equal (then it is a majority vote); `f1`: words in common; `chrf`: groups of
            characters in common, for languages without spaces too; `judge`: what a model says (X-MBR), in one call
            for each ordered pair.
        evidence: further samples that candidates are measured against, but that cannot be chosen themselves.
        language: that evidence is asked to be in; None: any other than the question's.
    """

    paper = "Kumar & Byrne 2004; Eikema & Aziz 2022, arXiv 2108.04718; X-MBR: arXiv 2506.20544"

    utility: Literal["exact", "f1", "chrf", "judge"] = "f1"
    evidence: int = Field(0, ge=0, le=64)
    language: str | None = None

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        """Mean utilities; those of `judge` are from 1 to 10, the others from 0 to 1."""
        references = [*candidates, *await self._evidence(thread)]
        if len(references) == 1:
            return [1.0]
        if self.utility == "judge":
            return await self._judged(thread, len(candidates), [solution(reference) for reference in references])
        profile, utility = _UTILITIES[self.utility]
        profiles = [profile(reference) for reference in references]
        scores = []
        for i, own in enumerate(profiles[: len(candidates)]):
            scores.append(_mean([utility(own, other) for j, other in enumerate(profiles) if j != i]))
            await asyncio.sleep(0)  # many long candidates take a while: others go on, and it can be cancelled
        return scores

    async def _evidence(self, thread: Thread) -> list[Candidate]:
        if not self.evidence:
            return []
        language = self.language or "a language other than that of the question"
        asked = thread.spawn([followed_by(thread.prompt, f"Answer in {language}.")] * self.evidence)
        drawn = await asked.map(lambda call: call.using(temperature=_EVIDENCE_TEMPERATURE).generate())
        return [call.candidate() for call in drawn]

    async def _judged(self, thread: Thread, count: int, texts: list[str]) -> list[float]:
        pairs = [(i, j) for i in range(count) for j in range(len(texts)) if i != j]
        found: dict[int, list[float]] = {i: [] for i in range(count)}

        def hear(index: int, reply: str) -> None:
            if (rating := rating_in(reply)) is not None:
                found[pairs[index][0]].append(rating)

        await self.ask(thread, [self._pair(thread, texts[i], texts[j]) for i, j in pairs], hear)
        return [_mean(found[i]) for i in range(count)]

    def _pair(self, thread: Thread, response: str, reference: str) -> str:
        parts = zip(("response", "reference"), shortened([response, reference], self.max_chars), strict=True)
        shown = [f"<{name}>\n{text or '(nothing)'}\n</{name}>" for name, text in parts]
        return "\n\n".join([f"<question>\n{task(thread.prompt)}\n</question>", *shown, _RATE])


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values) if values else 0.0


def _answer(candidate: Candidate) -> str:
    return same_answer(solution(candidate) if candidate.answer is None else candidate.answer) or ""


def _words(candidate: Candidate) -> Counter[str]:
    return Counter(re.findall(r"\w+", solution(candidate).casefold()))


def _grams(candidate: Candidate) -> list[Counter[str]]:
    text = "".join(solution(candidate).split())
    return [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, 7)]


def _common(one: Counter[str], other: Counter[str]) -> int:
    """What `(one & other).total()` is, without making a counter for it."""
    return sum(min(one[key], other[key]) for key in one.keys() & other.keys())


def f1(one: Counter[str], other: Counter[str]) -> float:
    """Harmonic mean of precision and recall of the words that two texts have in common; 1 for two empty ones."""
    total = one.total() + other.total()
    return 2 * _common(one, other) / total if total else 1.0


def chrf(one: Sequence[Counter[str]], other: Sequence[Counter[str]], beta: float = 2) -> float:
    """The chrF of Popović 2015: the F-score of precision and recall of character n-grams, each averaged over n = 1..6.

    Lengths n for which one of the two has no n-grams do not count; 1 for two empty texts.
    """
    sizes = [(a.total(), b.total(), _common(a, b)) for a, b in zip(one, other, strict=True)]
    if not one[0] and not other[0]:
        return 1.0
    both = [(common / a, common / b) for a, b, common in sizes if a and b]
    precision = _mean([p for p, _ in both])
    recall = _mean([r for _, r in both])
    weighted = beta**2 * precision + recall
    return (1 + beta**2) * precision * recall / weighted if weighted else 0.0


_UTILITIES: dict[str, tuple[Callable[[Candidate], Any], Callable[[Any, Any], float]]] = {
    "exact": (_answer, lambda one, other: float(one == other)),
    "f1": (_words, f1),
    "chrf": (_grams, chrf),
}
