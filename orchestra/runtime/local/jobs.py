"""What the scheduler works on: generations, each of which fills a node, and scorings.

Event loops create them; from then on only the worker thread touches them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestra.graph import ThreadGraph
from orchestra.graph import View as Concurrent
from orchestra.runtime.engine import Delta, Sampling, Stream
from orchestra.runtime.local.detokenize import Detokenizer, Endings, Finder, cut
from orchestra.runtime.local.nodes import Context, NodeState, Snapshot, View
from orchestra.runtime.local.segments import Segment, Slab
from orchestra.runtime.local.steering import Steering

if TYPE_CHECKING:
    from orchestra.runtime.local.gang import LocalGang
    from orchestra.runtime.local.lockstep import LockStep


@dataclass(slots=True, eq=False)
class Job:
    """One generation.

    Attributes:
        graph, node: the run and the node to fill.
        nodes: the context's nodes that the worker may not know yet, and the node itself (last).
        view: what the node's first token attends to besides itself.
        before: `(node id, index)` of the token that predicts the node's first one; None when nothing does.
        sampling: how to draw.
        key: of the noise, see `sampler.noise_key`.
        limit: most tokens to sample, by the request or the room in the context.
        ends: token ids that end the generation, to `(matched, eos)`.
        endings: tokens that can complete a stop string; None without stop strings.
        stream, loop: where the deltas go.
        chunk: wake the reader every so many tokens.
        detokenizer, finder: text and stop strings.
        number: in order of arrival.
        state: the stretch that it fills: what is new of the node's forced tokens, then what it samples.
        context: what the stretch's first token attends to.
        predictor: the stretch and the index of the token that predicts the first one; None when nothing has to.
        admitted: it has its memory, and what it reads is pinned; else it waits in line and holds nothing.
        reserved: where a slot is kept free for it, until it is placed.
        slab, slot, head: where its keys and values grow, and how many tokens of context were copied in front of them.
        copied: context that is in the head.
        inplace: context read where it is, `(state, tokens)`.
        forced: tokens of the stretch that were there before the generation.
        given: tokens to be fed before the next one can be drawn: the forced ones, and after a preemption all.
        fed: how many of the stretch's tokens have keys and values in the slot.
        sampled: how many tokens were drawn; `sent` of them have been delivered, `shown` were decoded.
        piece: text not delivered yet; `told` is the end of the text that was.
        logprobs, tempered, top: of the tokens not delivered yet.
        cached: context tokens that were on the engine when the job came.
        gang: of a concurrent node.
        group: of generations in lock-step.
        pending: the token before the first one, if the slot is to feed that as well; see `feed_predictor`.
        heir: the stretch that the token belongs to, which gets its keys and values.
        views: of a concurrent node, so far; `expected` is what its next token reads if nothing changes.
        done: it has ended; nothing more may be sent.
        steering: penalties, bias and grammar; None for the model's own distribution.
    """

    graph: ThreadGraph
    nodes: list[Snapshot]
    view: View
    before: tuple[int, int] | None
    sampling: Sampling
    key: int
    limit: int
    ends: Mapping[int, tuple[str | int | None, bool]]
    endings: Endings | None
    stream: Stream
    loop: asyncio.AbstractEventLoop
    chunk: int
    detokenizer: Detokenizer
    finder: Finder | None
    gang: LocalGang | None = None
    group: LockStep | None = None
    pending: int | None = None
    heir: NodeState | None = None
    number: int = 0
    state: NodeState = field(init=False)
    context: Context = field(default_factory=list)
    predictor: tuple[NodeState, int] | None = None
    admitted: bool = False
    reserved: Slab | None = None
    slab: Slab | None = None
    slot: int = 0
    head: int = 0
    copied: Context = field(default_factory=list)
    inplace: Context = field(default_factory=list)
    forced: int = 0
    given: int = 0
    fed: int = 0
    sampled: int = 0
    sent: int = 0
    shown: int = 0
    piece: str = ""
    told: str = ""
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    top: list[Mapping[int, float]] = field(default_factory=list)
    cached: int = 0
    views: list[Concurrent] = field(default_factory=list)
    expected: tuple[int, list[int]] | None = None
    done: bool = False
    steering: Steering | None = None

    @property
    def team(self) -> LocalGang | LockStep | None:
        """Whom it goes on with: they are admitted as a whole, and do not give way."""
        return self.gang or self.group

    def feed_predictor(self) -> None:
        """Have the slot feed the token that predicts the first one, if that is all that misses keys and values.

        So a group that goes on where it was stopped begins with an ordinary step of its slots. To compute each of the
        tokens where it belongs would take a call for each.
        """
        state, index = self.predictor or (self.state, -1)
        if index == state.done < state.room and self.context[-1] == (state, index + 1):
            self.pending, self.heir, self.predictor = state.tokens[index], state, None
            self.context[-1:] = [(state, index)] if index else []

    def accept(
        self, token: int, logprob: float, top: Mapping[int, float] | None = None, tempered: float | None = None
    ) -> Delta | None:
        """Take a drawn token; returns the delta to deliver when a chunk is full or the generation ends."""
        self.state.tokens.append(token)
        self.sampled += 1
        self.logprobs.append(logprob)
        if top is not None and self.sampling.top_logprobs:
            self.top.append(top)
        if tempered is not None and self.sampling.tempered:
            self.tempered.append(tempered)
        end = self.ends.get(token)
        if self.endings is not None and token in self.endings and (end is None or not end[1]):
            matched = self._show()
            if matched is not None:
                return self.finish("stop", matched)
        if end is not None:
            return self.finish("stop", *end)
        if self.steering is not None and self.steering.accept(token):
            return self.finish("stop")
        if self.sampled == self.limit:
            return self.finish("length")
        if self.sampled - self.sent < self.chunk:
            return None
        matched = self._show()
        return self._delta() if matched is None else self.finish("stop", matched)

    def finish(self, reason: str | None, matched: str | int | None = None, eos: bool = False) -> Delta:
        """The last delta: everything that is left."""
        self.done = True
        self._show(last=True)
        delta = self._delta(reason, matched, eos)
        if self.gang is not None:
            self.gang.end(self)
            delta.views = self.views
        return delta

    def _show(self, last: bool = False) -> str | None:
        """Decode what is pending; returns the stop string that it completes."""
        ids = self.state.tokens[self.forced + self.shown : self.forced + self.sampled]
        self.shown = self.sampled
        self.piece += self.detokenizer.push(ids, last)
        matched = self.finder.push(ids) if self.finder is not None and not last else None
        if matched is not None:
            self.piece = cut(self.told, self.piece, matched)
        return matched

    def _delta(self, reason: str | None = None, matched: str | int | None = None, eos: bool = False) -> Delta:
        tokens = self.state.tokens[self.forced + self.sent : self.forced + self.sampled]
        delta = Delta(tokens, len(tokens), self.piece, self.logprobs, self.top, reason, matched, eos, self.cached)
        delta.tempered = self.tempered
        if self.finder is not None and self.finder.keep:
            self.told = (self.told + self.piece)[-self.finder.keep :]
        self.sent, self.piece, self.logprobs, self.top, self.cached = self.sampled, "", [], [], 0
        self.tempered = []
        return delta


@dataclass(slots=True, eq=False)
class Score:
    """Log-probabilities of one node's tokens, computed in a scratch segment that nobody else reads.

    Attributes:
        graph, nodes, view, before, number, context, predictor, admitted: as in `Job`.
        future: gets the result.
        tokens, start: of the node.
        segment: scratch.
        fed: tokens done.
        result: log-probabilities so far.
    """

    graph: ThreadGraph
    nodes: list[Snapshot]
    view: View
    before: tuple[int, int] | None
    tokens: list[int]
    start: int
    future: Future[list[float]]
    number: int = 0
    context: Context = field(default_factory=list)
    predictor: tuple[NodeState, int] | None = None
    admitted: bool = False
    segment: Segment | None = None
    fed: int = 0
    result: list[float] = field(default_factory=list)
