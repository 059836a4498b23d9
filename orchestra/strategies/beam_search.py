"""Beam search: the likeliest texts that a search of limited width finds; in groups that avoid each other's tokens."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import Field, model_validator

from orchestra.errors import BudgetExceeded, UsageError
from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability, Delta
from orchestra.strategies.base import Strategy
from orchestra.thread import Thread
from orchestra.threads import Threads

_NEWS = 16  # steps between two times that the best growing beam is told to whoever may have to stop the search


class BeamSearch(Strategy):
    """The texts of the highest log-probability, normalised by length, that a search of limited width finds. Each step
    asks the model once for every beam, all of them side by side, and keeps the best continuations; nothing is drawn at
    random. With groups, a group pays for tokens that the groups before it have taken in the same step.

    Attributes:
        width: beams that grow at a time, in all groups together.
        groups: groups of equal width; 1 is plain beam search.
        diversity: what a token costs a group for each earlier group's beam that has taken it, in nats.
        normalise: `gnmt`: the sum of log-probabilities over ((5 + length) / 6) ** alpha; `mean`: over the length.
        alpha: of `gnmt`; 0 leaves the sum as it is.
        stop_when: a group ends when its best finished beam cannot be beaten (`best`), or when as many have finished as
            it is wide (`width`).
        max_tokens: most tokens of a beam; None: the run's.
    """

    needs = frozenset({Capability.CONTINUE, Capability.TOP_LOGPROBS})
    paper = "Freitag & Al-Onaizan 2017, arXiv 1702.01806; groups: Vijayakumar et al. 2016, arXiv 1610.02424"

    width: int = Field(4, ge=1, le=4096)
    groups: int = Field(1, ge=1)
    diversity: float = Field(0.5, ge=0)
    normalise: Literal["gnmt", "mean"] = "gnmt"
    alpha: float = Field(0.6, ge=0, le=10)
    stop_when: Literal["best", "width"] = "best"
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _even(self) -> BeamSearch:
        if self.width % self.groups:
            raise ValueError(f"width={self.width} is no multiple of groups={self.groups}")
        return self

    async def __call__(self, thread: Thread) -> Outcome:
        """Search, then choose."""
        if thread.sampling().steers:
            raise UsageError("beam_search weighs the model's own tokens: it takes no penalties, logit_bias or grammar")
        found = await _Search(self, thread).run()
        outcome = self.conclude([end.candidate for end in found])
        outcome._thread = found[self.choose(outcome.candidates)].thread
        return outcome

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The highest normalised log-probability; of beams that still grow only if none has ended."""
        ended = [candidate.finish_reason is not None for candidate in candidates]
        return max(range(len(candidates)), key=lambda i: (ended[i], candidates[i].weight))

    def normalised(self, score: float, length: int) -> float:
        """A sum of log-probabilities, made comparable over lengths."""
        return score / (length if self.normalise == "mean" else ((5 + length) / 6) ** self.alpha)


@dataclass(frozen=True, slots=True)
class Beam:
    """A text that grows.

    Attributes:
        thread: stands after it.
        ids: its tokens.
        score: the sum of their log-probabilities, in nats.
    """

    thread: Thread
    ids: tuple[int, ...] = ()
    score: float = 0.0


class Told(NamedTuple):
    """What comes after a beam: a thread with the likeliest token, that token, and `{token: log-probability}`."""

    grown: Thread
    likeliest: int
    top: Mapping[int, float]


class Option(NamedTuple):
    """A beam with one more token. They sort in the order in which they are taken."""

    cost: float
    order: int
    token: int
    beam: Beam
    score: float


class End(NamedTuple):
    """A beam that has ended: as a candidate, and as a thread to go on from."""

    candidate: Candidate
    thread: Thread


class _Search:
    """One search."""

    def __init__(self, strategy: BeamSearch, thread: Thread) -> None:
        self._strategy, self._thread = strategy, thread
        self._settings = thread.sampling()
        self._limit = strategy.max_tokens or self._settings.max_tokens
        self._size = strategy.width // strategy.groups
        self._pieces: dict[int, str] = {}
        self._best = Candidate(text="")  # of those that grow

    async def run(self) -> list[End]:
        """All groups, to their ends."""
        root = Beam(self._thread.fork(1)[0])
        live: list[list[Beam]] = [[root] for _ in range(self._strategy.groups)]
        ended: list[list[End]] = [[] for _ in live]
        step = 0
        while any(live) and step != self._limit:
            try:
                told = await self._ask([beam for group in live for beam in group])
            except BudgetExceeded:
                await self._tell(live)
                raise
            taken: Counter[int] = Counter()
            for index, group in enumerate(live):
                live[index] = await self._advance(group, told, taken, ended[index])
                if self._decided(live[index], ended[index]):
                    live[index] = []
            if step % _NEWS == 0:
                await self._tell(live)
            if step == 0:
                self._thread.offer(self._best)
            step += 1
        rest = [await self._end(beam, "length") for group in live for beam in group]
        return [end for group in ended for end in group] + rest

    @property
    def _ends(self) -> frozenset[int]:
        """Tokens that end a beam; a server may tell of more as it goes."""
        eos = frozenset() if self._settings.ignore_eos else self._thread.eos_ids
        return eos.union(self._settings.stop_ids)

    @property
    def _spare(self) -> int:
        """How many times the width must be looked at to find as many beams that go on."""
        return 1 + max(1, len(self._ends))

    async def _ask(self, beams: Sequence[Beam]) -> dict[tuple[int, ...], Told]:
        """What comes after each beam; one that several groups have is asked once."""
        most = self._strategy.width * self._spare

        async def ask(thread: Thread) -> Told:
            said = Delta()

            def hear(delta: Delta) -> bool:
                said.merge(delta)
                return False

            grown = await thread.generate(
                watch=hear, temperature=0.0, max_tokens=1, stop=(), stop_ids=(), logprobs=True, top_logprobs=most
            )
            return Told(grown, said.tokens[0], said.top[0]) if said.top else Told(grown, -1, {})

        distinct = {beam.ids: beam.thread for beam in beams}
        return dict(zip(distinct, await Threads(distinct.values()).map(ask), strict=True))

    async def _advance(
        self, group: Sequence[Beam], told: Mapping[tuple[int, ...], Told], taken: Counter[int], ended: list[End]
    ) -> list[Beam]:
        """One step of a group: the beams that go on. Those that end are put to the others, the tokens to `taken`."""
        ended += [await self._end(beam, "length") for beam in group if not told[beam.ids].top]  # the context is full
        options = sorted(self._options(group, told, taken))[: self._size * self._spare]
        live: list[Beam] = []
        tokens = []
        for place, option in enumerate(options):
            if len(live) == self._size:
                break
            beam = Beam(option.beam.thread, (*option.beam.ids, option.token), option.score)
            if (stop := await self._stop(beam)) is None:
                live.append(await self._grow(beam, told[option.beam.ids]))
            elif place < self._size:
                end = await self._end(beam, "stop", stop)
                self._thread.offer(end.candidate)
                ended.append(end)
            else:
                continue
            tokens.append(option.token)
        taken.update(tokens)
        ended.sort(key=lambda end: -end.candidate.weight)
        del ended[self._size :]
        return live

    def _options(
        self, group: Sequence[Beam], told: Mapping[tuple[int, ...], Told], taken: Counter[int]
    ) -> Iterator[Option]:
        for order, beam in enumerate(group):
            for token, logprob in told[beam.ids].top.items():
                score = beam.score + logprob
                if math.isfinite(score):
                    yield Option(self._strategy.diversity * taken[token] - score, order, token, beam, score)

    async def _stop(self, beam: Beam) -> str | None:
        """What ends a beam: a stop string, an empty one for a token that does; None if it goes on."""
        if beam.ids[-1] in self._ends:
            return ""
        if not self._settings.stop:
            return None
        text = await self._thread.decode(beam.ids, skip_special_tokens=False)
        return next((stop for stop in self._settings.stop if stop in text), None)

    async def _grow(self, beam: Beam, told: Told) -> Beam:
        """The beam with a thread that stands after its last token: it is there already if it was the likeliest."""
        token = beam.ids[-1]
        if token == told.likeliest:
            return Beam(told.grown, beam.ids, beam.score)
        if token not in self._pieces:
            self._pieces[token] = await self._thread.decode([token])
        return Beam(beam.thread.append(self._pieces[token], [token]).fork(1)[0], beam.ids, beam.score)

    async def _end(self, beam: Beam, reason: str | None, stop: str = "") -> End:
        """A beam as it is. Its text is that of all its tokens: a character may span several."""
        ids = [token for token in beam.ids if self._settings.ignore_eos or token not in self._thread.eos_ids]
        text = await self._thread.decode(ids, skip_special_tokens=self._settings.skip_special_tokens)
        if stop and (at := text.find(stop)) >= 0:
            text = text[: at + len(stop)]
        thread = self._thread.append(text, ids)
        candidate = thread.candidate(self._strategy.normalised(beam.score, max(1, len(beam.ids))))
        candidate.finish_reason, candidate.tokens, candidate.logprob = reason, len(beam.ids), beam.score
        return End(candidate, thread)

    async def _tell(self, live: Sequence[Sequence[Beam]]) -> None:
        """Bring the best beam that grows up to date."""
        growing = [beam for group in live for beam in group if beam.ids]
        if growing:
            best = max(growing, key=lambda beam: self._strategy.normalised(beam.score, len(beam.ids)))
            self._best.__dict__.update((await self._end(best, None)).candidate.__dict__)

    def _decided(self, live: Sequence[Beam], ended: Sequence[End]) -> bool:
        """Whether a group has come to its end."""
        if self._strategy.stop_when == "width":
            return len(ended) == self._size
        if not ended:
            return False
        return all(self._bound(beam) <= ended[0].candidate.weight for beam in live)

    def _bound(self, beam: Beam) -> float:
        """The best that can come of a beam: no token adds to the sum, and more of them divide it by more. Without a
        limit on tokens that would be nothing at all, so it is taken as it stands.
        """
        return self._strategy.normalised(beam.score, self._limit or len(beam.ids))
