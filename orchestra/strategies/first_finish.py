"""First-Finish Search and its relatives: of several samples, how long each takes says which ones to believe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.strategies.sampling import Samples, SamplingStrategy
from orchestra.strategies.voting import majority
from orchestra.thread import Thread
from orchestra.threads import Threads


class FirstFinish(SamplingStrategy):
    """Race independent samples, stop at the first `first` to end, vote among those (FFS-k@N).

    Attributes:
        samples: how many race (N).
        first: how many are waited for (k); with 1 the first to end is the answer.
        last: instead: all run to their end, and the `last` longest vote (LFS-k@N).
        until: where the race ends: `answer`: at the end of the sample; `thinking`: when it has ended its thinking
            (short-m@k, m being `first`). Those that win finish their solutions, the others are cancelled.
        thinking_end: what the model writes when it has ended its thinking.
        by: the clock: `tokens` (sampled along the critical path; independent of the schedule) or `time`.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = (
        "Agarwal et al. 2025, arXiv 2505.18149; FFS-k@N and LFS-k@N: arXiv 2512.02008; short-m@k: Hassid et al. 2025, "
        "arXiv 2505.17813"
    )

    first: Samples = 1
    last: Samples | None = None
    until: Literal["answer", "thinking"] = "answer"
    thinking_end: str = Field("</think>", min_length=1)
    by: Literal["tokens", "time"] = "tokens"

    @model_validator(mode="after")
    def _possible(self) -> FirstFinish:
        for name in ("first", "last"):
            if (getattr(self, name) or 0) > self.samples:
                raise ValueError(f"{name}={getattr(self, name)} of samples={self.samples} cannot finish")
        if self.last is not None and (self.first, self.until, self.by) != (1, "answer", "tokens"):
            raise ValueError("last=... waits for all samples and takes the longest: leave first, until and by away")
        if self.until == "thinking":
            self.plain("until='thinking'")
        return self

    def requirements(self) -> frozenset[Capability]:
        """To go on after the thinking, if the race ends there."""
        return super().requirements() | ({Capability.CONTINUE} if self.until == "thinking" else frozenset())

    async def __call__(self, thread: Thread) -> Outcome:
        """Race, then vote among the winners."""
        branches = self.branches(thread)
        if self.last is not None:
            return self.conclude(_longest(await self.draw_all(branches), self.last))
        if self.until == "answer":
            return self.conclude(await branches.race(first=self.first, by=self.by, work=self.draw))
        thoughts = await branches.race(first=self.first, by=self.by, work=self._think)
        return self.conclude(await Threads(thoughts).map(self._solve))

    async def _think(self, branch: Thread) -> Thread:
        """Sample up to the end of the thinking, or the end of a sample that does not come to that."""
        settings = self.plain("until='thinking'").settings()
        stop = (*branch.sampling(**settings).stop, self.thinking_end)
        return await branch.generate(**settings | {"stop": stop})

    async def _solve(self, thought: Thread) -> Candidate:
        """Sample the solution after the thinking, with what is left of `max_tokens`, and offer the whole."""
        settings = self.plain("until='thinking'").settings()
        most, thinking = thought.sampling(**settings).max_tokens, thought.sampled_tokens
        if thought.matched != self.thinking_end:
            candidate = thought.candidate()
        elif most is not None and most <= thinking:
            candidate = thought.candidate()
            candidate.finish_reason = "length"
        else:
            left = None if most is None else most - thinking
            candidate = (await thought.generate(**settings | {"max_tokens": left})).candidate()
            candidate.tokens += thinking
        candidate.weight = self.weigh(candidate)
        thought.offer(candidate)
        return candidate

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The first candidate with the most frequent answer."""
        return majority(candidates)


def _longest(drawn: Sequence[Candidate], count: int) -> list[Candidate]:
    """The longest first; only `count` of them keep their votes. Of equal length, the later is taken to end later."""
    ranked = [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: (-drawn[i].tokens, -i))]
    for candidate in ranked[count:]:
        candidate.weight = 0.0
    return ranked
