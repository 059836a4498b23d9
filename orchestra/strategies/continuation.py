"""What has been sampled after a thread, token by token: it can be cut anywhere, grown, and moved (Metropolis-Hastings).

Power sampling (`power_mh`) is a chain of such moves; `reward_smc` moves its particles by them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from orchestra.errors import UsageError
from orchestra.outcome import Candidate
from orchestra.runtime.engine import Capability, Sampling
from orchestra.thread import Thread


class Scored(Protocol):
    """A sampled token string, as far as its weight goes."""

    @property
    def logprobs(self) -> Sequence[float]:
        """Of each token under the model (nats)."""

    @property
    def tempered(self) -> Sequence[float]:
        """Of each token under the law that it was drawn from (nats)."""


def log_ratio(old: Scored, new: Scored, cut: int, alpha: float) -> float:
    """Logarithm of the Metropolis-Hastings ratio of a move in p^alpha from `old` to `new`.

    The move has cut `old` after `cut` of its tokens, a number drawn evenly from 0 to `len(old) - 1`, and drawn the rest
    anew. On the way back, the same cut is one of `len(new)`; whatever the lengths, the whole of both suffixes counts:

        alpha (log p(new) - log p(old)) + log q(old) - log q(new) + log len(old) - log len(new)
    """
    p = math.fsum(new.logprobs[cut:]) - math.fsum(old.logprobs[cut:])
    q = math.fsum(old.tempered[cut:]) - math.fsum(new.tempered[cut:])
    return alpha * p + q + math.log(len(old.logprobs)) - math.log(len(new.logprobs))


def accepted(log_ratio: float, rng: random.Random) -> bool:
    """Whether a move is made; always one uniform number, so that what comes next does not depend on it."""
    return math.log1p(-rng.random()) < log_ratio


class _Piece(NamedTuple):
    """One generation, and how many of its tokens remain."""

    thread: Thread
    kept: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What has been sampled after `root`. A value: growing and cutting give new ones.

    Attributes:
        root: the thread before it, a fork. All that grows has a fork path under its path.
        ids: its tokens; an end of sequence is one of them.
        logprobs, tempered: see `Scored`.
        ended: nothing can follow: an end of sequence, a stop, or the end of the context.
    """

    root: Thread
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    tempered: tuple[float, ...] = ()
    ended: bool = False
    _pieces: tuple[_Piece, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, length: int) -> Continuation:
        """The first `length` tokens."""
        pieces: list[_Piece] = []
        left = length
        for thread, kept in self._pieces:
            if left > 0:
                pieces.append(_Piece(thread, min(kept, left)))
            left -= kept
        whole = length == len(self)
        return replace(
            self,
            ids=self.ids[:length],
            logprobs=self.logprobs[:length],
            tempered=self.tempered[:length],
            ended=self.ended and whole,
            _pieces=tuple(pieces),
        )

    def fork(self) -> Continuation:
        """The same, to go on from with randomness of its own."""
        root = self.root
        return replace(self, root=root._with(path=root._run.fork_path(root.path[:-1])))

    async def grow(self, count: int, sampling: Mapping[str, Any], pause: str = "") -> Continuation:
        """With up to `count` more tokens, unless it has ended; or up to the string at which it pauses.

        Raises:
            BudgetExceeded: a budget ended it.
        """
        if self.ended or count < 1:
            return self
        path = self.root._run.fork_path(self.root.path)
        thread = (await self._end())._with(path=path)
        stops = (*thread.sampling().stop, pause) if pause else None
        grown = await thread.generate(**sampling, stop=stops, max_tokens=count, logprobs=True, tempered=True)
        ids = [token for span in grown._sampled for token in span.tokens]
        if not len(ids) == len(grown.logprobs) == len(grown.tempered):
            raise UsageError(f"{grown._run.engine_for(grown._alias).name} does not tell every token's probability")
        paused = grown.matched == pause if pause else False
        return replace(
            self,
            ids=(*self.ids, *ids),
            logprobs=(*self.logprobs, *grown.logprobs),
            tempered=(*self.tempered, *grown.tempered),
            ended=not paused and (grown.finish_reason != "length" or len(ids) < count),
            _pieces=(*self._pieces, _Piece(grown, len(ids))) if ids else self._pieces,
        )

    @property
    def nodes(self) -> list[int]:
        """The nodes of the graph that it has tokens of."""
        return [piece.thread._node.id for piece in self._pieces if piece.thread._node is not None]

    async def _end(self) -> Thread:
        """A thread that stands after it."""
        if not self._pieces:
            return self.root
        thread, kept = self._pieces[-1]
        return thread if kept == thread.sampled_tokens else await thread.cut(kept)

    async def text(self) -> str:
        """What it says, decoded as one: a character may span several generations."""
        settings, eos = self.root.sampling(), self.root.eos_ids
        ids = [token for token in self.ids if settings.ignore_eos or token not in eos]
        return await self.root.decode(ids, skip_special_tokens=settings.skip_special_tokens) if ids else ""

    async def thread(self) -> Thread:
        """A thread that stands after it, to go on from, with its text as a whole."""
        thread = await self._end()
        return thread._with(_before=self.root.text + await self.text(), _tail=()) if self._pieces else thread

    async def candidate(self, weight: float = 1.0) -> Candidate:
        """It as a candidate."""
        text = self.root.text + await self.text()
        return Candidate(
            text=text,
            answer=self.root.answer_in(text),
            weight=weight,
            finish_reason=self._pieces[-1].thread.finish_reason if self._pieces else None,
            tokens=len(self),
            logprob=math.fsum(self.logprobs) if self.logprobs else None,
            logprob_tokens=len(self),
        )


def forget(dropped: Iterable[Continuation], kept: Iterable[Continuation]) -> None:
    """A hint to the engine: what only `dropped` ones of a run have is not needed any more."""
    gone: dict[int, None] = {}
    root = None
    for state in dropped:
        root = state.root
        gone |= dict.fromkeys(state.nodes)
    for state in kept:
        for node in state.nodes:
            gone.pop(node, None)
    if root is not None and gone:
        root._run.engine_for(root._alias).forget(root._run.graph, gone)


class Standing:
    """The candidate that a strategy offers, kept up to date: what there is if a budget ends it."""

    def __init__(self, thread: Thread) -> None:
        self._thread = thread
        self._candidate: Candidate | None = None

    def tell(self, candidate: Candidate) -> None:
        """From now on it is this one."""
        if self._candidate is None:
            self._candidate = candidate.model_copy()
            self._thread.offer(self._candidate)
        else:
            self._candidate.__dict__.update(candidate.__dict__)


def truncations(sampling: Sampling) -> list[str]:
    """What in these settings keeps a sampler from all texts that the model could say, or from knowing their weight.

    Not `ignore_eos`: the end of sequence is then a token as any other, and all texts are of one length.
    """
    found = {
        f"top_k={sampling.top_k}": sampling.top_k,
        f"top_p={sampling.top_p:g}": sampling.top_p < 1,
        f"min_p={sampling.min_p:g}": sampling.min_p,
    }
    return [what for what, given in found.items() if given] + sorted(sampling.needs - {Capability.STREAMS})


def exact(name: str, sampling: Sampling, approximate: bool, *, cuts: bool = False) -> list[str]:
    """What makes a sampler's result approximate; see `truncations`.

    Args:
        name: of the strategy.
        sampling: the settings.
        approximate: whether that is asked for.
        cuts: texts are cut and drawn anew: a stop string that a cut goes through would not end them.

    Raises:
        UsageError: something does, and it was not asked for.
    """
    found = truncations(sampling) + (["stop strings"] if cuts and sampling.stop else [])
    if found and not approximate:
        raise UsageError(
            f"{name} draws from all texts by their probability; {', '.join(found)} would change that: leave it out, or "
            "say approximate=true"
        )
    return found
