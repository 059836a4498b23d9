"""Candidates by their own log-probability."""

from __future__ import annotations

from orchestra.outcome import Candidate
from orchestra.runtime.engine import Capability
from orchestra.strategies.scorers.base import LOWEST, Scorer


class Logprob(Scorer):
    """The raw log-probability of the sample; a draft whose result is no one thread has none, and comes last."""

    needs = frozenset({Capability.LOGPROBS})

    def weigh(self, candidate: Candidate) -> float:
        """The sum over its tokens (nats)."""
        return LOWEST if candidate.logprob is None else candidate.logprob


class MeanLogprob(Logprob):
    """The raw log-probability per token of the sample; a draft whose result is no one thread comes last."""

    def weigh(self, candidate: Candidate) -> float:
        """The mean over its tokens (nats)."""
        return LOWEST if candidate.logprob is None else candidate.logprob / max(candidate.logprob_tokens, 1)
