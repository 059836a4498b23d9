"""DeepConf: a vote weighted by confidence, among the traces that the model was surest of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.strategies.confidence import Confidence, Measure, quantile
from orchestra.strategies.sampling import Samples, SamplingStrategy
from orchestra.strategies.voting import majority, tally
from orchestra.thread import Thread
from orchestra.threads import Threads

Trace = tuple[Candidate, Confidence]

_EQUAL = 1e-4  # nats: groups that are closer differ by the rounding of a model that runs in another batch


class ConfidenceVote(SamplingStrategy):
    """Confidence-weighted vote among the most confident samples (DeepConf).

    Without `warmup` all samples run to their end. With it, the first `warmup` samples set a threshold, and later ones
    are stopped as soon as a group of their tokens falls below it; sampling ends when the answers agree.

    Attributes:
        samples: how many, at most.
        keep: share of the samples that may vote: the most confident ones (0.1 is the paper's "low", 0.9 its "high").
        measure: confidence of a sample, its weight in the vote: that of its `lowest` group of tokens, of the `bottom`
            tenth of its groups, of its `tail` (the last group), or the `mean` of all.
        window: tokens of a group.
        top: alternatives of a token that its confidence is measured by.
        warmup: samples that set the threshold by their lowest group; None: no sample is stopped.
        batch: later samples that are drawn side by side before the answers are looked at again.
        consensus: weighted share of the leading answer at which sampling ends.
        drafts: what draws one sample: `sample(...)`; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Fu et al. 2025, arXiv 2508.15260"
    needs: ClassVar[frozenset[Capability]] = frozenset({Capability.TOP_LOGPROBS})

    samples: Samples = 64
    keep: float = Field(0.1, gt=0, le=1)
    measure: Measure = "lowest"
    window: int = Field(2048, ge=1)
    top: int = Field(20, ge=2, le=1000)
    warmup: Samples | None = None
    batch: Samples = 16
    consensus: float = Field(0.95, gt=0, le=1)

    @model_validator(mode="after")
    def _possible(self) -> ConfidenceVote:
        self.plain("confidence_vote")
        unused = sorted({"batch", "consensus"} & self.model_fields_set) if self.warmup is None else []
        if unused:
            raise ValueError(f"{unused[0]}=... is for what comes after a warmup: say warmup=16")
        if self.warmup is not None and self.warmup >= self.samples:
            raise ValueError(f"warmup={self.warmup} of samples={self.samples} leaves none to save on")
        return self

    async def __call__(self, thread: Thread) -> Outcome:
        """Sample, weigh, vote."""
        base = self.prepared(thread)
        if self.warmup is None:
            traces = await self._draw(base.fork(self.samples))
            return self.conclude(self._most_confident([candidate for candidate, _ in traces]))
        traces = await self._draw(base.fork(self.warmup))
        floor = self._floor([confidence.measure("lowest") for _, confidence in traces])
        while len(traces) < self.samples and _agreement(traces) < self.consensus:
            traces += await self._draw(base.fork(min(self.batch, self.samples - len(traces))), floor)
        for candidate, confidence in traces:
            if confidence.measure("lowest") < floor:
                candidate.weight = 0.0
        return self.conclude([candidate for candidate, _ in traces])

    async def _draw(self, branches: Threads, floor: float = -math.inf) -> list[Trace]:
        async def draw(branch: Thread) -> Trace:
            confidence = Confidence(self.window, floor)
            settings = self.plain("confidence_vote").settings() | {"top_logprobs": self.top}
            candidate = (await branch.generate(watch=confidence.watch, **settings)).candidate()
            voted = candidate.answer is not None and not confidence.fell
            candidate.weight = confidence.measure(self.measure) if voted else 0.0
            branch.offer(candidate)
            return candidate, confidence

        return await branches.map(draw)

    def _most_confident(self, candidates: list[Candidate]) -> list[Candidate]:
        """Take the votes of all but the share that is kept of those with an answer."""
        floor = self._floor([candidate.weight for candidate in candidates if candidate.answer is not None] or [0.0])
        for candidate in candidates:
            if candidate.weight < floor:
                candidate.weight = 0.0
        return candidates

    def _floor(self, confidences: Sequence[float]) -> float:
        """What a share of `keep` of them reaches."""
        return quantile(confidences, 1 - self.keep) - _EQUAL

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The first candidate with the answer of the largest total confidence."""
        return majority(candidates)


def _agreement(traces: Sequence[Trace]) -> float:
    """Weighted share of the leading answer among the traces that were not stopped."""
    votes = tally([candidate for candidate, _ in traces]).values()
    return max(votes) / sum(votes) if votes else 0.0
