"""Cautious next-token prediction (CNTP): where the model is unsure, try several ways on and keep the surest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field, model_validator

from orchestra.runtime.engine import Capability, Delta
from orchestra.strategies.base import Strategy
from orchestra.strategies.continuation import Standing
from orchestra.strategies.sampling import DRAFT_TEMPERATURE
from orchestra.thread import BudgetCut, Thread
from orchestra.threads import Threads

PUNCTUATION = (".", ",", ";", ":", "!", "?", "\n")


class Cautious(Strategy):
    """One text, written from punctuation to punctuation; where the next token is uncertain, several trials are sampled
    to the next punctuation and the one of the lowest perplexity is kept (CNTP). Trials are drawn at 0.6 unless the run
    sets a temperature.

    Attributes:
        trials: most trials of one stretch.
        min_entropy, max_entropy: of the next token, in nats: up to the first one trial is enough, from the second on
            all are made.
        punctuation: strings that end a trial.
        top: likeliest tokens that the entropy is computed from; all others count as one.
        max_tokens: most tokens of the text; None: the run's.
    """

    needs = frozenset({Capability.CONTINUE, Capability.LOGPROBS, Capability.TOP_LOGPROBS})
    paper = "2025, arXiv 2507.03038"

    trials: int = Field(10, ge=1, le=4096)
    min_entropy: float = Field(0.01, ge=0)
    max_entropy: float = Field(1.5, gt=0)
    punctuation: list[str] = Field(default_factory=lambda: list(PUNCTUATION), min_length=1)
    top: int = Field(20, ge=1)
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Cautious:
        if self.min_entropy >= self.max_entropy:
            raise ValueError(f"min_entropy={self.min_entropy:g} is not below max_entropy={self.max_entropy:g}")
        return self

    def trials_at(self, entropy: float) -> int:
        """How many trials an entropy of the next token (nats) asks for."""
        part = (entropy - self.min_entropy) / (self.max_entropy - self.min_entropy)
        return min(max(math.floor(part * self.trials), 1), self.trials)

    async def __call__(self, thread: Thread) -> Thread:
        """Stretch by stretch, to the end."""
        thread = thread.using(temperature=DRAFT_TEMPERATURE)
        settings = thread.sampling()
        left, standing = self.max_tokens or settings.max_tokens, Standing(thread)
        while True:
            said = await self._stretch(thread, left, (*settings.stop, *self.punctuation), standing)
            left = None if left is None else left - said.sampled_tokens
            if said.matched not in self.punctuation or said.matched in settings.stop:
                return said
            thread = await _whole(thread, said)
            standing.tell(thread.candidate())
            if left is not None and left < 1:
                return thread

    async def _stretch(self, thread: Thread, left: int | None, stop: Sequence[str], standing: Standing) -> Thread:
        """The surest of the trials. The first tells the entropy where all of them begin, and so how many there are."""
        first: list[Mapping[int, float]] = []

        def hear(delta: Delta) -> bool:
            first.extend(delta.top[: 1 - len(first)])
            return False

        forks = thread.fork(self.trials)
        try:
            sure = await forks[0].generate(watch=hear, stop=stop, max_tokens=left, logprobs=True, top_logprobs=self.top)
        except BudgetCut as spent:
            standing.tell(spent.thread.candidate())
            raise
        standing.tell(sure.candidate())
        count = self.trials_at(entropy(first[0].values())) if first else 1
        others = await Threads(forks[1:count]).generate(stop=stop, max_tokens=left, logprobs=True)
        surest: Thread = min((sure, *others), key=perplexity)
        return surest


def entropy(logprobs: Iterable[float]) -> float:
    """Entropy in nats of a distribution of which the likeliest outcomes are given; the rest counts as one outcome.

    So it is never above the true one; with rest r over m more outcomes, it is at most r log m below.
    """
    given = [math.exp(value) for value in logprobs]
    rest = max(0.0, 1 - math.fsum(given))
    return -math.fsum(p * math.log(p) for p in (*given, rest) if p > 0)


def perplexity(thread: Thread) -> float:
    """Of the last generation, by the model itself: exp of minus the mean log-probability; infinite if it is empty."""
    logprobs = thread.logprobs
    return math.exp(-math.fsum(logprobs) / len(logprobs)) if logprobs else math.inf


async def _whole(before: Thread, said: Thread) -> Thread:
    """`said` with all the text of its tokens: a stop string ends the text, even where its last token goes on."""
    ids = [token for span in said._sampled for token in span.tokens]
    if len(ids) != said.sampled_tokens:
        return said  # the engine tells no ids; where it stopped is where its text ends
    text = await said.decode(ids, skip_special_tokens=said.sampling().skip_special_tokens)
    return said._with(_before=before.text + text)
