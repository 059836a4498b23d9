"""Best-of-N: sample several answers, keep the one that a scorer likes best."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pydantic import Field, model_validator

from orchestra.errors import UsageError
from orchestra.group import gather
from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.spec import Named
from orchestra.strategies.sample import Sample
from orchestra.strategies.sampling import SamplingStrategy
from orchestra.strategies.scorers import MeanLogprob, Reward, Scorer, ScorerField
from orchestra.strategies.scorers.base import tell
from orchestra.strategies.scorers.reward import RewardFunction
from orchestra.strategies.voting import same_answer
from orchestra.thread import Thread
from orchestra.threads import Threads

HOT_TEMPERATURE = 0.7
"""Of the samples that hedge a greedy one."""


class BestOf(SamplingStrategy):
    """The best of several samples by a scorer. Samples without an answer are taken only if none has one.

    Attributes:
        samples: how many.
        scorer: what scores them (`orchestra strategies` lists the scorers); of equals the one with the most frequent
            answer is taken.
        reward: a function from the response text to a score, which may be a coroutine function, instead of `scorer`
            (Python only; not in specs).
        hedged: the first sample is greedy, the others are drawn at 0.7 unless `drafts` or the run sets another.
        min_p: of the samples: leave out tokens less likely than this part of the likeliest one, unless the run sets it.
        drafts: what draws one sample; its temperature is 0.6 unless it or the run sets another.
    """

    paper = "Cobbe et al. 2021, arXiv 2110.14168; hedged: Khairi et al. 2025, arXiv 2506.20544"

    scorer: ScorerField = Field(default_factory=MeanLogprob)
    reward: RewardFunction | None = Field(None, exclude=True)
    hedged: bool = False
    min_p: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> BestOf:
        if self.reward is not None and "scorer" in self.model_fields_set:
            raise ValueError("either a scorer or a reward function")
        if self.hedged and type(self.drafts) is not Sample:
            raise ValueError("hedged samples are drawn by drafts=sample(...)")
        return self

    @property
    def chosen_by(self) -> Scorer:
        """The scorer in use."""
        return self.scorer if self.reward is None else Reward(function=self.reward)

    def inner(self) -> Iterable[Named]:
        """The drafts, and the scorer in use."""
        return [self.drafts, self.chosen_by]

    def branches(self, thread: Thread) -> Threads:
        """Forks whose log-probabilities are reported, if they are what scores."""
        logprobs = Capability.LOGPROBS in self.chosen_by.requirements() or None
        temperature = HOT_TEMPERATURE if self.hedged else None
        return super().branches(thread.using(logprobs=logprobs, temperature=temperature, min_p=self.min_p or None))

    async def draw_all(self, branches: Threads) -> list[Candidate]:
        """Draw on all branches side by side; greedily on the first, if hedged."""
        if not self.hedged:
            return await super().draw_all(branches)
        greedy = self.model_copy(update={"drafts": self.drafts.model_copy(update={"temperature": 0.0})})
        first, rest = Threads(branches[:1]), Threads(branches[1:])
        drawn = await gather([SamplingStrategy.draw_all(greedy, first), super().draw_all(rest)])
        return drawn[0] + drawn[1]

    def weigh(self, candidate: Candidate) -> float:
        """The score, as far as it is known when the sample is drawn."""
        tell([candidate], [self.chosen_by.weigh(candidate)])
        return candidate.weight

    async def __call__(self, thread: Thread) -> Outcome:
        """Draw all samples side by side, score those with an answer, then choose."""
        candidates = await self.draw_all(self.branches(thread))
        eligible = [candidate for candidate in candidates if candidate.answer is not None] or candidates
        scores = await self.chosen_by(thread, eligible)
        if len(scores) != len(eligible):
            raise UsageError(f"{self.chosen_by.name} gave {len(scores)} scores for {len(eligible)} candidates")
        tell(eligible, scores)
        return self.conclude(candidates)

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The highest weight among those with an answer; of equals the most frequent answer, then the first."""
        answers = [same_answer(candidate.answer) for candidate in candidates]
        votes = Counter(answers)
        return max(
            range(len(candidates)), key=lambda i: (answers[i] is not None, candidates[i].weight, votes[answers[i]])
        )
