"""Self-consistency: sample several answers, take the most frequent; stop sampling when the vote is decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from orchestra.outcome import Candidate, Outcome
from orchestra.strategies.sampling import Samples, SamplingStrategy
from orchestra.strategies.voting import lead_certainty, majority, tally, unanimous
from orchestra.thread import Thread

_WINDOW = {"unanimous": 5, "confident": 1}


class SelfConsistency(SamplingStrategy):
    """Majority vote over independent samples; samples without an answer have no vote.

    Attributes:
        samples: how many, at most.
        until: when to stop before that: `unanimous`: all samples of one window have the same answer (ESC); `confident`:
            the leading answer is the more likely one of the first two with a probability of at least `confidence`
            (Adaptive-Consistency). None: never; all samples are drawn side by side.
        window: how many samples are drawn side by side before it is asked again; by default 5 until unanimous, and 1
            (one after the other) until confident.
        confidence: see `until`.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Wang et al. 2022, arXiv 2203.11171; ESC: arXiv 2401.10480; Adaptive-Consistency: arXiv 2305.11860"

    until: Literal["unanimous", "confident"] | None = None
    window: Samples | None = None
    confidence: float = Field(0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _meant(self) -> SelfConsistency:
        if self.window is not None and self.until is None:
            raise ValueError("window=... is drawn before a stop is thought of: say until='unanimous' or 'confident'")
        if self.window == 1 and self.until == "unanimous":
            raise ValueError("a window of one sample is always unanimous; it takes at least 2")
        if "confidence" in self.model_fields_set and self.until != "confident":
            raise ValueError("confidence=... is for until='confident'")
        return self

    async def __call__(self, thread: Thread) -> Outcome:
        """Draw window after window until the vote is decided, then choose from all that was drawn."""
        base = self.prepared(thread)
        window = self.window or _WINDOW.get(self.until or "", self.samples)
        drawn: list[Candidate] = []
        while len(drawn) < self.samples:
            latest = await self.draw_all(base.fork(min(window, self.samples - len(drawn))))
            drawn += latest
            if self._decided(drawn, latest):
                break
        return self.conclude(drawn)

    def _decided(self, drawn: Sequence[Candidate], latest: Sequence[Candidate]) -> bool:
        if self.until == "unanimous":
            return unanimous(latest)
        if self.until == "confident":
            first, second, *_ = *sorted(map(int, tally(drawn).values()), reverse=True), 0, 0
            return lead_certainty(first, second) >= self.confidence
        return False

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The first candidate with the most frequent answer."""
        return majority(candidates)
