"""What all strategies that draw several independent samples share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from orchestra.outcome import Candidate, Outcome
from orchestra.strategies.base import Strategy, StrategyField
from orchestra.strategies.sample import Sample
from orchestra.thread import Thread
from orchestra.threads import Threads

MAX_SAMPLES = 4096  # more than anyone has reported; a typing error should not order a million generations
DRAFT_TEMPERATURE = 0.6
"""Of samples that nobody gave one: what First-Finish Search and most reasoning models use."""
Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]


class SamplingStrategy(Strategy):
    """Several independent samples, then a choice.

    Attributes:
        samples: how many.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    abstract = True

    samples: Samples = 8
    drafts: StrategyField = Field(default_factory=Sample)

    def prepared(self, thread: Thread) -> Thread:
        """The thread that samples are forked from. Asked for once, so that all of them share what is before them."""
        return thread.using(temperature=DRAFT_TEMPERATURE)

    def branches(self, thread: Thread) -> Threads:
        """One fork for each sample."""
        return self.prepared(thread).fork(self.samples)

    def plain(self, what: str) -> Sample:
        """The drafts of a strategy whose `what` works inside one generation.

        Raises:
            ValueError: they are more than one generation.
        """
        if type(self.drafts) is not Sample:
            raise ValueError(f"{what} takes drafts=sample(...), one generation each, not {self.drafts.name}")
        return self.drafts

    async def draw(self, branch: Thread) -> Candidate:
        """Draw one sample and offer it."""
        candidate = (await branch.run(self.drafts)).as_candidate()
        candidate.weight = self.weigh(candidate)
        branch.offer(candidate)
        return candidate

    async def draw_all(self, branches: Threads) -> list[Candidate]:
        """Draw on all branches side by side; plain samples as one group, which an engine may serve with one request."""
        if type(self.drafts) is not Sample:
            return await branches.map(self.draw)
        drawn: dict[int, Candidate] = {}

        def offer(index: int, branch: Thread) -> None:
            candidate = drawn[index] = branch.candidate()
            candidate.weight = self.weigh(candidate)
            branch.offer(candidate)

        await branches.generate(each=offer, **self.drafts.settings())
        return [drawn[index] for index in range(len(branches))]

    def weigh(self, candidate: Candidate) -> float:
        """What a sample counts for in the choice: one vote, if it has an answer."""
        return float(candidate.answer is not None)

    async def __call__(self, thread: Thread) -> Outcome:
        """Draw all samples side by side, then choose."""
        return self.conclude(await self.draw_all(self.branches(thread)))
