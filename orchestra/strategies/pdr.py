"""Parallel-Distill-Refine: rounds of parallel drafts, each shown a short workspace made of the round before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Prompt
from orchestra.spec import EngineAlias
from orchestra.strategies import distillers
from orchestra.strategies.base import Strategy, StrategyField
from orchestra.strategies.sample import Sample
from orchestra.strategies.sampling import DRAFT_TEMPERATURE, Samples, SamplingStrategy
from orchestra.strategies.workspace import Draft, by_support, informed, latest, shown, usable
from orchestra.thread import Thread


class _Round(SamplingStrategy):
    """The drafts of one round; a later round counts for more."""

    abstract = True

    number: int

    def weigh(self, candidate: Candidate) -> float:
        return float(self.number)


class Pdr(Strategy):
    """Parallel-Distill-Refine: each round draws drafts side by side, distils them into a workspace of bounded length,
    and the next round sees the question and that workspace, nothing else. A last round of one draft gives the answer.

    Attributes:
        widths: drafts of each round before the last one, which has one.
        drafts: what draws one draft; its temperature is 0.6 unless it or the run sets another.
        distiller: `global_summary`: one call sums up all drafts; `shared_top_k`: one call selects k of them for all;
            `per_sample_top_k`: each draft of the next round begins with a call that selects its own; `random_k`: each
            gets k at random.
        k: drafts in a workspace; a global summary has them all.
        workspace_tokens: most tokens of a workspace, as the engine that reads it counts.
        engine: alias of the engine that sums up and selects; empty: the one that drafts.
    """

    paper = "Madaan et al. 2025, arXiv 2510.01123"

    widths: list[Samples] = Field(default=[8], min_length=1, max_length=64)
    drafts: StrategyField = Field(default_factory=Sample)
    distiller: Literal["global_summary", "shared_top_k", "per_sample_top_k", "random_k"] = "per_sample_top_k"
    k: int = Field(2, ge=1, le=256)
    workspace_tokens: int = Field(4096, ge=1)
    engine: EngineAlias = ""

    async def __call__(self, thread: Thread) -> Outcome:
        """Draft, distil, and draft again; the last draft is the result."""
        opened = await thread.opened()
        drafting = thread.using(temperature=DRAFT_TEMPERATURE)
        last: list[Candidate] = []
        drawn: list[Candidate] = []
        for number, width in enumerate([*self.widths, 1], 1):
            rules = _Round(samples=width, drafts=self.drafts, number=number)
            drafts = usable(last, opened)
            if drafts and self.distiller in ("per_sample_top_k", "random_k"):
                last = await self._each_its_own(rules, drafting, drafts)
            else:
                prompt = await self._shared(thread, drafts) if drafts else None
                start = drafting.spawn([prompt])[0] if prompt else drafting
                last = await rules.draw_all(start.fork(width))
            drawn = last + drawn
        return self.conclude(drawn)

    async def _shared(self, thread: Thread, drafts: list[Draft]) -> Prompt | None:
        """What all drafts of the next round are asked; None if there is nothing to show them."""
        if self.distiller == "global_summary":
            summary = await distillers.global_summary(thread, drafts, self.workspace_tokens, self.engine)
            if summary:
                return informed(thread.prompt, summary)
            return await self._of(thread, drafts, by_support(drafts)[: self.k])
        return await self._of(thread, drafts, await distillers.best(thread, drafts, self.k, self.engine))

    async def _each_its_own(self, rules: _Round, drafting: Thread, drafts: list[Draft]) -> list[Candidate]:
        """A round whose members pick their drafts themselves, side by side."""

        async def member(branch: Thread) -> Candidate:
            if self.distiller == "random_k":
                picked = distillers.at_random(branch, drafts, self.k)
            else:
                picked = await distillers.best(branch, drafts, self.k, self.engine)
            prompt = await self._of(branch, drafts, picked)
            return await rules.draw(branch.spawn([prompt])[0] if prompt else branch)

        return await drafting.fork(rules.samples).map(member)

    async def _of(self, thread: Thread, drafts: list[Draft], picked: Sequence[int]) -> Prompt | None:
        """What is asked with some drafts. A solution is cut at its beginning: what it comes to stands at its end."""
        return await shown(thread, [drafts[i] for i in picked], self.workspace_tokens)

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The last draft; if it has no answer, or is not there yet, the majority of the last round that has one."""
        return latest(candidates)
