"""Power-SMC: draws from the sequence-level power distribution p(y)^alpha by sequential Monte Carlo."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence

from pydantic import Field

from orchestra.errors import BudgetExceeded, EngineError
from orchestra.lockstep import GroupCut
from orchestra.outcome import Candidate, Outcome
from orchestra.run import scope
from orchestra.runtime.engine import Capability, Step
from orchestra.strategies.base import Strategy
from orchestra.strategies.continuation import exact
from orchestra.strategies.particles import Resampler, draw, effective_sample_size, log_mean, normalised, resample
from orchestra.strategies.sampling import MAX_SAMPLES
from orchestra.thread import Thread
from orchestra.threads import Threads

BLOCK = 64
"""Tokens between two looks at the weights on engines that cannot look at each."""

_SIGNS = 64  # tokens after which particles that nobody resamples are shown to whoever may have to stop the run


class PowerSmc(Strategy):
    """A draw from p(y)^alpha, normalised over whole texts: sequential Monte Carlo with exponents that rise (Power-SMC).

    Particles grow in lock-step, each token drawn from softmax(alpha_t log p), and are weighted for what that leaves out
    of the target: a text whose every token is likely is not yet a likely text. When the weights become uneven, the
    particles are resampled: the light ones give way to copies of the heavy ones. One particle is drawn by weight; all
    are candidates, with their weights, and `log_evidence` estimates the log of the sum of p(y)^alpha over all texts.

    The run's own temperature is not used. Stop strings end a text as the end of sequence does. Under a budget the
    heaviest of the unfinished particles is the result.

    Attributes:
        alpha: the exponent; 1 is plain sampling.
        particles: how many.
        ess: resample when the effective sample size falls below this part of the particles; 0 never, 1 at every look.
        ramp: the exponent rises linearly to alpha over so many tokens; 0 for none.
        resampler: `systematic`, `multinomial`, `stratified`, `residual` or `chopthin`, which keeps unequal weights.
        temperature: of the proposal; None: 1 / alpha_t, for which a token's weight does not depend on the token.
        block: tokens between two looks at the weights; None: 1 where the engine can look at each, else 64. The exponent
            rises from block to block.
        max_tokens: most tokens of a text; None: the run's. The target is over texts of at most so many.
        approximate: allow settings that keep tokens from being drawn (top_p, top_k, min_p, ...). The result is then no
            draw from the target, and says so.
    """

    needs = frozenset({Capability.CONTINUE, Capability.LOGPROBS, Capability.TEMPERED})
    paper = "Azizi et al. 2026, arXiv 2602.10273; Chopthin: Gandy & Lau 2016, arXiv 1502.07396"

    alpha: float = Field(4.0, gt=0, le=1000)
    particles: int = Field(64, ge=1, le=MAX_SAMPLES)
    ess: float = Field(0.5, ge=0, le=1)
    ramp: int = Field(100, ge=0)
    resampler: Resampler = "systematic"
    temperature: float | None = Field(None, gt=0, le=1000)
    block: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    approximate: bool = False

    async def __call__(self, thread: Thread) -> Outcome:
        """Grow, weigh and resample to the end, then draw."""
        settings = thread.sampling()
        said = exact(self.name, settings, self.approximate)
        swarm = _Swarm(self, thread, self.max_tokens or settings.max_tokens)
        try:
            await swarm.grow()
        except (BudgetExceeded, asyncio.CancelledError):
            for candidate in swarm.candidates():
                thread.offer(candidate)
            raise
        candidates = swarm.candidates()
        chosen = draw(swarm.weights.logs, swarm.rng)
        best = candidates[chosen]
        outcome = Outcome(
            text=best.text,
            answer=best.answer,
            candidates=candidates,
            finish_reason=best.finish_reason,
            log_evidence=log_mean(swarm.weights.logs),
            approximate=said,
        )
        outcome._thread = swarm.threads[chosen]
        return outcome

    def exponent(self, index: int) -> float:
        """The exponent in force when token `index` of a text is drawn."""
        return 1 + (self.alpha - 1) * min(1.0, (index + 1) / self.ramp) if self.ramp else self.alpha


class PowerWeights:
    """The weights of particles whose target is p^exponent, while the exponent rises (arXiv:2602.10273, section 4).

    Attributes:
        logs: log weights.
        sums: raw log-probability of each particle's tokens, in nats.
        exponent: of the target now.
    """

    def __init__(self, particles: int) -> None:
        self.logs = [0.0] * particles
        self.sums = [0.0] * particles
        self.exponent = 1.0

    def raise_to(self, exponent: float) -> None:
        """Change the target: every particle is weighted anew for all its tokens, finished ones included."""
        if (more := exponent - self.exponent) != 0:
            self.logs = [log + more * total for log, total in zip(self.logs, self.sums, strict=True)]
            self.exponent = exponent

    def grow(self, index: int, logprob: float, tempered: float) -> None:
        """A particle has new tokens.

        Args:
            index: of the particle.
            logprob: their log-probability, by the model.
            tempered: by the law that they were drawn from.
        """
        self.logs[index] += self.exponent * logprob - tempered
        self.sums[index] += logprob

    def resample(self, ancestors: Iterable[int], logs: Sequence[float]) -> None:
        """Put copies of some particles in the place of all."""
        self.sums = [self.sums[ancestor] for ancestor in ancestors]
        self.logs = list(logs)


class _Swarm:
    """The particles of one run."""

    def __init__(self, strategy: PowerSmc, thread: Thread, limit: int | None) -> None:
        self._strategy, self._limit = strategy, limit
        self._at_each = Capability.LOCK_STEP in thread.capabilities
        self._block = strategy.block or (1 if self._at_each else BLOCK)
        self._timed = any(owner.ledger.budget.wall_seconds is not None for owner in scope().chain)
        self.rng = thread.random(strategy.name)
        self.threads = thread.fork(strategy.particles)
        self.weights = PowerWeights(strategy.particles)
        self._alive = [True] * strategy.particles
        self._lengths = [0] * strategy.particles
        self._length = 0  # of those that grow

    def candidates(self) -> list[Candidate]:
        """The particles as they are, with normalised weights."""
        made = []
        logs = self.weights.logs
        for index, (thread, weight) in enumerate(zip(self.threads, normalised(logs), strict=True)):
            candidate = thread.candidate(weight)
            candidate.logprob, candidate.tokens = self.weights.sums[index], self._lengths[index]
            candidate.logprob_tokens = self._lengths[index]
            made.append(candidate)
        return made

    async def grow(self) -> None:
        """Grow to the end."""
        while live := [index for index, alive in enumerate(self._alive) if alive]:
            await (self._advance(live) if self._at_each else self._advance_blindly(live))
            if self._uneven() and any(self._alive):
                ancestors, logs = resample(self.weights.logs, self._strategy.resampler, self.rng)
                self.threads = self.threads.resample(ancestors)
                self.weights.resample(ancestors, logs)
                self._alive = [self._alive[ancestor] for ancestor in ancestors]
                self._lengths = [self._lengths[ancestor] for ancestor in ancestors]
        self.weights.raise_to(self._strategy.alpha)

    def _uneven(self) -> bool:
        least = self._strategy.ess * len(self.weights.logs)
        return least > 0 and effective_sample_size(self.weights.logs) < least

    def _exponent(self, index: int) -> float:
        """In force when token `index` of a text is drawn: the one that the ramp has at the end of the token's block."""
        return self._strategy.exponent((index // self._block + 1) * self._block - 1)

    async def _advance(self, live: Sequence[int]) -> None:
        """Grow until the weights are uneven, or all have ended."""
        weights, start = self.weights, self._length

        def look(step: Step) -> bool:
            weights.raise_to(self._exponent(self._length))
            for member, logprob, tempered in zip(step.members, step.logprobs, step.tempered, strict=True):
                weights.grow(live[member], logprob, tempered)
                self._lengths[live[member]] += 1
            self._length += 1
            if self._timed and self._length - start == _SIGNS:
                return True
            return self._length % self._block == 0 and self._uneven()

        powers = tuple(self._exponent(index) for index in range(start, max(start + 1, self._strategy.ramp)))
        temperature = self._strategy.temperature
        law = {"powers": powers} if temperature is None else {"temperature": temperature}
        left = None if self._limit is None else self._limit - start
        try:
            grown = await self._group(live).generate_in_step(look, max_tokens=left, tempered=True, **law)
        except GroupCut as cut:
            self._put(live, cut.threads)
            raise
        self._put(live, grown)
        for index, thread in zip(live, grown, strict=True):
            self._alive[index] = thread.finish_reason == "paused"

    async def _advance_blindly(self, live: Sequence[int]) -> None:
        """Grow by a block, with one exponent."""
        size = self._block if self._limit is None else min(self._block, self._limit - self._length)
        self.weights.raise_to(self._exponent(self._length))
        temperature = self._strategy.temperature or 1 / self.weights.exponent
        grown = await self._group(live).generate(max_tokens=size, temperature=temperature, logprobs=True, tempered=True)
        self._length += size
        self._put(live, grown)
        for index, thread in zip(live, grown, strict=True):
            logprobs, tempered, count = thread.logprobs, thread.tempered, thread.sampled_tokens
            if not len(logprobs) == len(tempered) == count:
                raise EngineError(
                    "the engine does not tell the probabilities that tokens were drawn with (a SGLang server must not "
                    "have SGLANG_RETURN_ORIGINAL_LOGPROB)"
                )
            self.weights.grow(index, math.fsum(logprobs), math.fsum(tempered))
            self._lengths[index] += count
            cut_short = thread.finish_reason == "length" and count == size
            self._alive[index] = cut_short and self._length != self._limit

    def _group(self, live: Sequence[int]) -> Threads:
        return Threads(self.threads[index] for index in live)

    def _put(self, live: Sequence[int], grown: Sequence[Thread]) -> None:
        """Threads that have grown in the place of those that they were."""
        threads = list(self.threads)
        for index, thread in zip(live, grown, strict=True):
            threads[index] = thread
        self.threads = Threads(threads)
