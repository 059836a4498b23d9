"""ParScale (arXiv:2505.10475): several learned streams of every token inside the model, weighed token by token."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.strategies.base import Strategy, StrategyField
from orchestra.strategies.sample import Sample
from orchestra.thread import Thread


class ParallelStreams(Strategy):
    """Any strategy, on a model that computes every token in several learned streams.

    Attributes:
        streams: how many; the engine must have learned parameters for this number. 1 is the model without streams.
        drafts: what is run.
    """

    needs = frozenset({Capability.STREAMS})
    paper = "Chen et al. 2025, arXiv 2505.10475"

    streams: int = Field(4, ge=1)
    drafts: StrategyField = Field(default_factory=Sample)

    async def __call__(self, thread: Thread) -> Thread | Outcome:
        """Run it, with so many streams in every thread that comes from this one."""
        return await self.drafts(thread.setting(streams=self.streams))

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """As the drafts do: it is their candidates."""
        return self.drafts.choose(candidates)

    def conclude(self, candidates: Sequence[Candidate]) -> Outcome:
        """As the drafts do."""
        return self.drafts.conclude(candidates)
