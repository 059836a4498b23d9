"""Self-consistency: sample several answers, take the most frequent."""

from __future__ import annotations

from collections.abc import Sequence

from orchestra.outcome import Candidate
from orchestra.strategies.sampling import SamplingStrategy
from orchestra.strategies.voting import majority


class SelfConsistency(SamplingStrategy):
    """Majority vote over independent samples; samples without an answer have no vote.

    Attributes:
        samples: how many.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Wang et al. 2022, arXiv 2203.11171"

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The first candidate with the most frequent answer."""
        return majority(candidates)
