"""First-Finish Search: of several samples, the ones that end first are the best bet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from orchestra.outcome import Candidate, Outcome
from orchestra.strategies.sampling import SamplingStrategy
from orchestra.strategies.voting import majority
from orchestra.thread import Thread


class FirstFinish(SamplingStrategy):
    """Race independent samples, stop at the first `first` to end, vote among those (FFS-k@N).

    Attributes:
        samples: how many race (N).
        first: how many are waited for (k); with 1 the first to end is the answer.
        by: the clock: `tokens` (sampled along the critical path; independent of the schedule) or `time`.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Agarwal et al. 2025, arXiv 2505.18149; FFS-k@N: arXiv 2512.02008"

    first: int = Field(1, ge=1)
    by: Literal["tokens", "time"] = "tokens"

    @model_validator(mode="after")
    def _enough(self) -> FirstFinish:
        if self.first > self.samples:
            raise ValueError(f"first={self.first} of samples={self.samples} cannot finish")
        return self

    async def __call__(self, thread: Thread) -> Outcome:
        """Race, then vote among the winners."""
        return self.conclude(await self.branches(thread).race(first=self.first, by=self.by, work=self.draw))

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The first candidate with the most frequent answer."""
        return majority(candidates)
