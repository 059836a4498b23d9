"""Best-of-N: sample several answers, keep the one that a scorer likes best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from orchestra.outcome import Candidate
from orchestra.runtime.engine import Capability
from orchestra.strategies.sampling import SamplingStrategy
from orchestra.thread import Thread, Threads


class BestOf(SamplingStrategy):
    """The best of several samples. Samples without an answer are taken only if none has one.

    Attributes:
        samples: how many.
        scorer: `logprob`: the raw log-probability of the sample; `mean_logprob`: the same per token.
        reward: a function from the response text to a score, instead of `scorer` (Python only; not in specs).
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Cobbe et al. 2021, arXiv 2110.14168"

    scorer: Literal["mean_logprob", "logprob"] = "mean_logprob"
    reward: Callable[[str], float] | None = Field(None, exclude=True)

    def requirements(self) -> frozenset[Capability]:
        """Log-probabilities, unless a reward function scores."""
        return super().requirements() | (frozenset() if self.reward else frozenset({Capability.LOGPROBS}))

    def branches(self, thread: Thread) -> Threads:
        """Forks whose log-probabilities are reported, if they are what scores."""
        return super().branches(thread if self.reward else thread.using(logprobs=True))

    def weigh(self, candidate: Candidate) -> float:
        """The score."""
        if self.reward is not None:
            return float(self.reward(candidate.text))
        if candidate.logprob is None:  # a draft that is no one thread has no log-probability: last in line
            return -1e9
        return candidate.logprob / (max(candidate.tokens, 1) if self.scorer == "mean_logprob" else 1)

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The highest weight among those with an answer."""
        return max(range(len(candidates)), key=lambda i: (candidates[i].answer is not None, candidates[i].weight))
