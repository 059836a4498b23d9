"""DeepSeek-GRM: a generative judge, sampled several times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import fsum
from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field, model_validator

from orchestra.outcome import Candidate
from orchestra.spec import OptionalEngineAlias
from orchestra.strategies.sampling import Samples
from orchestra.strategies.scorers.asking import AskingScorer, exhibits, rating_in, scores_in, shuffles
from orchestra.strategies.scorers.base import solution, tell

if TYPE_CHECKING:
    from orchestra.thread import Thread

_JUDGE = """Judge the responses to the question above.

First write down the principles by which a response to this very question should be judged, and how much each counts.
Then criticise every response by these principles. Last, on lines of their own, give every response a whole number from
1 (worst) to 10 (best), in this form:

Response 1: NUMBER
Response 2: NUMBER"""

_META = """Above is a judgement of the responses to the question. Judge this judgement: are its principles the right
ones for the question, is what it says about the responses true, and do its scores follow? Say so in a few sentences,
then end with one line that gives it a whole number from 1 (worthless) to 10 (excellent), in this form:

Score: NUMBER"""


class Judgement(NamedTuple):
    """One usable reply of the judge.

    Attributes:
        prompt: what it was shown.
        text: what it said.
        scores: of each candidate, in the order of the candidates.
    """

    prompt: str
    text: str
    scores: list[float]


class Judge(AskingScorer):
    """A judge writes principles and a critique, and scores every candidate; the sum over several judgements counts.

    Attributes:
        samples: judgements; each sees the candidates in an order of its own.
        temperature: of the judgements.
        meta: alias of the engine that rates the judgements, so that only the best count (empty: the run's own);
            None: all count.
        keep: how many judgements the rating leaves; None: half.
    """

    paper = "Liu et al. 2025, arXiv 2504.02495"

    samples: Samples = 4
    temperature: float = Field(0.5, ge=0, le=100)
    meta: OptionalEngineAlias = None
    keep: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _enough(self) -> Judge:
        if self.keep is not None and (self.meta is None or self.keep > self.samples):
            raise ValueError(f"keep={self.keep} needs meta=ALIAS, and at most samples={self.samples}")
        return self

    async def __call__(self, thread: Thread, candidates: Sequence[Candidate]) -> list[float]:
        """Sums of scores; all 0 if no judgement can be used."""
        if len(candidates) == 1:
            return [1.0]
        orders = shuffles(thread, self.samples, len(candidates))
        responses = [solution(candidate) for candidate in candidates]
        shown = [exhibits(thread.prompt, [responses[i] for i in order], self.max_chars) for order in orders]
        usable: dict[int, Judgement] = {}

        def hear(index: int, reply: str) -> None:
            scores = scores_in(reply, len(candidates))
            if scores is not None:
                by_candidate = [score for _, score in sorted(zip(orders[index], scores, strict=True))]
                usable[index] = Judgement(shown[index], reply, by_candidate)
                tell(candidates, _total(usable.values()))

        await self.ask(thread, [f"{text}\n\n{_JUDGE}" for text in shown], hear, self.temperature)
        judgements = [usable[index] for index in sorted(usable)]
        if self.meta is not None:
            judgements = await self._best(thread, judgements)
        return _total(judgements) if judgements else [0.0] * len(candidates)

    async def _best(self, thread: Thread, judgements: list[Judgement]) -> list[Judgement]:
        """Those that the meta-judge rates best; one that it says nothing usable about comes last."""
        keep = self.keep or max(1, self.samples // 2)
        if len(judgements) <= keep:
            return judgements
        ratings = [0.0] * len(judgements)

        def hear(index: int, reply: str) -> None:
            ratings[index] = rating_in(reply) or 0.0

        prompts = [f"{j.prompt}\n\n<judgement>\n{j.text}\n</judgement>\n\n{_META}" for j in judgements]
        await self.model_copy(update={"engine": self.meta}).ask(thread, prompts, hear)
        best = sorted(range(len(judgements)), key=lambda index: -ratings[index])[:keep]
        return [judgements[index] for index in best]


def _total(judgements: Iterable[Judgement]) -> list[float]:
    """Sums over judgements, whatever their order."""
    return [fsum(scores) for scores in zip(*(judgement.scores for judgement in judgements), strict=True)]
