"""Sequential Monte Carlo guided by a reward: particles that are weighted, resampled and moved while they grow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field, model_validator

from orchestra.group import gather
from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.spec import Named
from orchestra.strategies.base import Strategy
from orchestra.strategies.continuation import Continuation, accepted, exact, forget, log_ratio
from orchestra.strategies.particles import Resampler, draw, effective_sample_size, log_mean, normalised, resample
from orchestra.strategies.potentials import Potential, compares, log_potentials
from orchestra.strategies.power_mh import MAX_TOKENS
from orchestra.strategies.sampling import MAX_SAMPLES
from orchestra.strategies.scorers import Reward, Scorer, ScorerField
from orchestra.strategies.scorers.reward import RewardFunction
from orchestra.thread import BudgetCut, Thread


class RewardSmc(Strategy):
    """A draw from the model's law of whole texts times a potential of the text, by weighted particles that grow in
    steps: after each, their weights follow the potential, and when few of them carry the weight they are resampled.

    Attributes:
        particles: how many.
        scorer: what scores a text, also one that still grows (`orchestra strategies` lists the scorers); None: nothing.
        reward: a function from the text to a score, which may be a coroutine function, instead of `scorer` (Python
            only; not in specs). One that returns True or False is a constraint with `potential=score`.
        potential: of a score s: `odds` s / (1 - s), `exp` e^s, or s itself (`score`).
        alpha: exponent of the model's law.
        target: `tempered`: each token by its own power, softmax(alpha log p); `power`: p^alpha of the whole text.
        step: a string that ends a step; empty for none.
        step_tokens: most tokens of a step; None for no limit.
        ess: resample when the effective sample size is below this part of the particles; 0 never, 1 after every step.
        resampler: how.
        moves: Metropolis-Hastings moves of each particle after resampling; for steps of tokens.
        lookahead: rollouts for each particle and step that estimate what of the power a text has still before it.
        product: the potentials of all steps count, not that of the whole text alone.
        pick: what is returned: a `draw` by weight, or the particle of the `best` weight.
        max_tokens: most tokens of a particle; None: the run's, else 3072.
        approximate: allow settings that truncate the distribution, which the outcome then says.
    """

    needs = frozenset({Capability.CONTINUE, Capability.CUT, Capability.LOGPROBS, Capability.TEMPERED})
    paper = "2026, arXiv 2604.16453; particle filtering: Puri et al. 2025, arXiv 2502.01618"

    particles: int = Field(16, ge=1, le=MAX_SAMPLES)
    scorer: ScorerField | None = None
    reward: RewardFunction | None = Field(None, exclude=True)
    potential: Potential = "odds"
    alpha: float = Field(1, gt=0, le=100)
    target: Literal["tempered", "power"] = "tempered"
    step: str = ""
    step_tokens: int | None = Field(64, ge=1)
    ess: float = Field(0.5, ge=0, le=1)
    resampler: Resampler = "systematic"
    moves: int = Field(0, ge=0)
    lookahead: int = Field(0, ge=0)
    product: bool = False
    pick: Literal["draw", "best"] = "draw"
    max_tokens: int | None = Field(None, ge=1)
    approximate: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> RewardSmc:
        if self.reward is not None and self.scorer is not None:
            raise ValueError("either a scorer or a reward function")
        if not self.step and self.step_tokens is None:
            raise ValueError("a step ends at step='...' or after step_tokens")
        if self.moves and self.step:
            raise ValueError("moves begin at any token, so they take steps of tokens: step=''")
        if self.lookahead and self.target != "power":
            raise ValueError("lookahead is for target='power'; the other law has nothing before it to estimate")
        return self

    @property
    def scored_by(self) -> Scorer | None:
        """The scorer in use."""
        return self.scorer if self.reward is None else Reward(function=self.reward)

    def inner(self) -> Iterable[Named]:
        """The scorer in use."""
        return [] if self.scored_by is None else [self.scored_by]

    async def __call__(self, thread: Thread) -> Outcome:
        """Filter, then pick."""
        said = exact(self.name, thread.sampling(), self.approximate, cuts=True)
        if self.product:
            said.append("product: how often a potential counts depends on how long the particles take")
        if self.scored_by is not None and compares(self.scored_by):
            said.append(f"{self.scored_by.name} scores particles beside others")
        return await _Filter(self, thread).run(said)

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The best weight; of particles that still grow only if none has ended."""
        return max(
            range(len(candidates)), key=lambda i: (candidates[i].finish_reason is not None, candidates[i].weight)
        )


@dataclass(frozen=True, slots=True)
class _Particle:
    """A text with the logarithm of what it is believed to be worth besides its own law: its twist."""

    state: Continuation
    twist: float = 0.0


class _Filter:
    """One run of the particles."""

    def __init__(self, strategy: RewardSmc, thread: Thread) -> None:
        self._strategy, self._thread = strategy, thread
        self._limit = strategy.max_tokens or thread.sampling().max_tokens or MAX_TOKENS
        self._sampling: dict[str, Any] = {"temperature": 1 / strategy.alpha}
        self._rng = thread.random(strategy.name)
        self._particles = [_Particle(Continuation(fork)) for fork in thread.fork(strategy.particles)]
        self._log_weights = [0.0] * strategy.particles
        self._standing: list[Candidate] = []

    async def run(self, said: list[str]) -> Outcome:
        """All steps; the outcome."""
        steps = 0
        while True:
            steps += 1
            reach = min(self._limit, steps * (self._strategy.step_tokens or self._limit))
            await self._advance(reach)
            if max(self._log_weights) == -math.inf:
                said.append("no particle is left: the potential of all is zero")
                break
            if all(self._done(particle.state) for particle in self._particles):
                break
            if self._resample():
                for _ in range(self._strategy.moves):
                    await self._move(reach)
        return await self._conclude(said)

    def _done(self, state: Continuation) -> bool:
        return state.ended or len(state) >= self._limit

    async def _advance(self, reach: int) -> None:
        """One step of all particles, and what it does to their weights."""
        old = self._particles
        try:
            states = await gather([self._grow(particle.state, reach) for particle in old])
        except BudgetCut as spent:
            if not self._standing:
                self._thread.offer(spent.thread.candidate())
            raise
        self._thread._run.meet(self._thread.path, self._thread._alias)
        if self._strategy.product:
            grown = list(range(len(old)))
        else:  # what has not grown keeps its twist, and so its weight
            grown = [index for index, particle in enumerate(old) if len(states[index]) > len(particle.state)]
        twists = dict(zip(grown, await self._twists([states[index] for index in grown]), strict=True))
        self._particles = [_Particle(state, twists.get(i, old[i].twist)) for i, state in enumerate(states)]
        for index in grown:
            before = 0.0 if self._strategy.product else old[index].twist
            gain = self._law(states[index], len(old[index].state)) + twists[index] - before
            if self._log_weights[index] > -math.inf:
                self._log_weights[index] += gain
        await self._tell()

    async def _grow(self, state: Continuation, reach: int) -> Continuation:
        strategy = self._strategy
        count = reach - len(state)
        if strategy.step:
            count = min(strategy.step_tokens or self._limit, self._limit - len(state))
        return await state.grow(count, self._sampling, strategy.step)

    def _law(self, state: Continuation, begin: int) -> float:
        """What the law of the target gives tokens from `begin` on beyond that of the proposals, in nats."""
        if self._strategy.target == "tempered":
            return 0.0
        p, q = math.fsum(state.logprobs[begin:]), math.fsum(state.tempered[begin:])
        return self._strategy.alpha * p - q

    async def _twists(self, states: Sequence[Continuation]) -> list[float]:
        """Logarithms of the potentials, times what lies before those that go on."""
        ahead = [0.0] * len(states)
        if self._strategy.lookahead:
            ahead = await gather([self._ahead(state) for state in states])
            self._thread._run.meet(self._thread.path, self._thread._alias)
        scorer = self._strategy.scored_by
        if scorer is None:
            return ahead
        texts = [await state.candidate() for state in states]
        values = await log_potentials(self._thread, texts, scorer, self._strategy.potential)
        return [value + more for value, more in zip(values, ahead, strict=True)]

    async def _ahead(self, state: Continuation) -> float:
        """An estimate of the sum of p^alpha over all ways to go on, without bias, by rollouts."""
        if self._done(state):
            return 0.0
        forks = [state.fork() for _ in range(self._strategy.lookahead)]
        ends = await gather([fork.grow(self._limit - len(fork), self._sampling) for fork in forks])
        forget(ends, [state])
        return log_mean([self._law(end, len(state)) for end in ends])

    def _resample(self) -> bool:
        """Whether the particles have been resampled."""
        strategy, count = self._strategy, len(self._particles)
        if strategy.ess < 1 and effective_sample_size(self._log_weights) >= strategy.ess * count:
            return False
        ancestors, self._log_weights = resample(self._log_weights, strategy.resampler, self._rng)
        chosen = [self._particles[index] for index in ancestors]
        forget([particle.state for particle in self._particles], [particle.state for particle in chosen])
        self._particles = [replace(particle, state=particle.state.fork()) for particle in chosen]
        return True

    async def _move(self, reach: int) -> None:
        """One Metropolis-Hastings move of every particle, which leaves the law of this step as it is.

        Of all: to move only those that resampling has copied would favour some texts, since which are copied depends on
        their weights.
        """
        cuts = [self._rng.randrange(len(particle.state)) for particle in self._particles]
        work = [self._redraw(p.state, cut, reach) for p, cut in zip(self._particles, cuts, strict=True)]
        states = await gather(work)
        self._thread._run.meet(self._thread.path, self._thread._alias)
        twists = await self._twists(states)
        for index, (new, twist, cut) in enumerate(zip(states, twists, cuts, strict=True)):
            old, state = self._particles[index], self._particles[index].state
            # Under the tempered law, which is that of the proposals, only the lengths are left of the ratio.
            power = self._strategy.target == "power"
            ratio = log_ratio(state, new, cut, self._strategy.alpha) if power else math.log(len(state) / len(new))
            if accepted(ratio + twist - old.twist, self._rng):
                self._particles[index] = _Particle(new, twist)
                states[index] = state
        forget(states, [particle.state for particle in self._particles])  # the losers
        await self._tell()

    async def _redraw(self, state: Continuation, cut: int, reach: int) -> Continuation:
        return await state.cut(cut).grow(reach - cut, self._sampling)

    async def _candidates(self) -> list[Candidate]:
        alive = max(self._log_weights) > -math.inf
        weights = normalised(self._log_weights) if alive else [0.0] * len(self._particles)
        found = []
        for particle, weight in zip(self._particles, weights, strict=True):
            candidate = await particle.state.candidate(weight)
            if not self._done(particle.state):
                candidate.finish_reason = None
            found.append(candidate)
        return found

    async def _tell(self) -> None:
        """Bring what there is if a budget ends the run up to date."""
        now = await self._candidates()
        if self._standing:
            for standing, candidate in zip(self._standing, now, strict=True):
                standing.__dict__.update(candidate.__dict__)
        else:
            self._standing = now
            for candidate in now:
                self._thread.offer(candidate)

    async def _conclude(self, said: list[str]) -> Outcome:
        candidates = await self._candidates()
        evidence = log_mean(self._log_weights)
        outcome = Outcome(candidates=candidates, approximate=said)
        if evidence == -math.inf:
            return outcome
        outcome.log_evidence = None if self._strategy.product else evidence
        best = self._strategy.pick == "best"
        picked = self._strategy.choose(candidates) if best else draw(self._log_weights, self._rng)
        outcome.text, outcome.answer = candidates[picked].text, candidates[picked].answer
        outcome.finish_reason = candidates[picked].finish_reason
        outcome._thread = await self._particles[picked].state.thread()
        return outcome
