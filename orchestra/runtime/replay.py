"""The replay engine: recorded samples on a simulated clock, to judge sampling strategies without a model.

Fork k of an item's run is its sample k, whatever the order in which the forks come. A sample takes as long as its
tokens take at the engine's rate, so races, early stops, budgets and seconds come out as they would have been.
docs/evaluation.md tells users what is exact and what is not.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from orchestra.errors import CapabilityError, PromptError, UsageError
from orchestra.graph import Span, ThreadGraph
from orchestra.runtime.clock import SimulatedClock, Timer
from orchestra.runtime.engine import Delta, Engine, Load, Prompt, Request, Stream
from orchestra.runtime.recording import Recorded, Recording

RATE = 50.0
"""Tokens a second of one generation, unless the URL says otherwise."""

_ROUNDING = 1e-6  # tokens; times are sums and quotients of floats


@dataclass(eq=False, slots=True)
class _Playing:
    """A generation that is being replayed.

    Attributes:
        count: tokens at which it ends; fewer than the sample has if it is cut.
        pushed: tokens that its reader has.
        end: when that is.
    """

    request: Request
    stream: Stream
    sample: Recorded
    began: float
    count: int
    pushed: int = 0
    end: Timer | None = None

    def text(self, tokens: int) -> str:
        """The text of the first `tokens` tokens: in proportion, for nobody recorded where each of them ends."""
        text, whole = self.sample.text, self.sample.sampled_tokens
        return text if tokens == whole else text[: len(text) * tokens // whole]

    def push(self, tokens: int, finish_reason: str | None = None) -> int:
        """Tell the reader all up to `tokens`; returns how many are new."""
        new = tokens - self.pushed
        if new or finish_reason:
            delta = Delta(count=new, text=self.text(tokens)[len(self.text(self.pushed)) :], finish_reason=finish_reason)
            if finish_reason in ("stop", "length") and tokens == self.sample.sampled_tokens:
                delta.notes = self.sample.notes
            self.pushed = tokens
            self.stream.push(delta)
        return new


@dataclass(eq=False, slots=True)
class _Timeline:
    """What is replayed in one run.

    Attributes:
        depths: sampled tokens on the heaviest chain to each generation that has ended, sorted, each once.
        used: the samples that are taken.
        look: when those who watch generations are told next how far these are.
    """

    graph: ThreadGraph
    clock: SimulatedClock = field(default_factory=SimulatedClock)
    live: dict[int, _Playing] = field(default_factory=dict)
    depths: list[int] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    look: Timer | None = None

    @property
    def watched(self) -> list[_Playing]:
        return [playing for playing in self.live.values() if playing.request.chunk == 1]


class ReplayEngine(Engine):
    """Replays the samples of a file. It can do nothing else: no sample is continued, scored or drawn anew.

    Args:
        path: a file of recorded samples; see `orchestra.runtime.recording`.
        rate: tokens a second of one generation, however many there are at once.
    """

    recorded = True

    def __init__(self, path: str | Path, *, rate: float = RATE) -> None:
        if not 0 < rate < float("inf"):
            raise UsageError(f"rate must be tokens a second, above 0, got {rate}")
        self.path, self.rate = Path(path), rate
        self.name = f"replay:{self.path.name}"
        self._recording: Recording | None = None
        self._timelines: dict[int, _Timeline] = {}  # by identity: graphs are compared by content
        self._sampled = 0

    async def open(self) -> Self:
        """Read the file.

        Raises:
            UsageError: it cannot be read, or is not a recording; says which line is wrong.
        """
        if self._recording is None:
            self._recording = await asyncio.to_thread(Recording, self.path)
        return self

    @property
    def recording(self) -> Recording:
        """The samples; reads them, if that has not been done."""
        if self._recording is None:
            self._recording = Recording(self.path)
        return self._recording

    async def encode_prompt(self, prompt: Prompt, *, item: str = "", **template: Any) -> Span:
        """The prompt of `item`. It counts as many tokens as were recorded with it; else as many as it has words.

        Raises:
            PromptError: it is empty.
            UsageError: there is no such item.
        """
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        if not text.strip():
            raise PromptError("the prompt is empty")
        tokens = self.recording.prompt_tokens(self.recording.find(item))
        return Span("prompt", [], tokens or len(text.split()), text)

    async def encode(self, text: str) -> Span:
        """Only empty text.

        Raises:
            CapabilityError: there is some.
        """
        if text:
            raise CapabilityError(f"{self.name} cannot go on after text that a strategy writes: {_INSTEAD}")
        return Span("forced")

    def clock(self, graph: ThreadGraph) -> SimulatedClock:
        """The run's own clock, from 0."""
        return self._timeline(graph).clock

    def _timeline(self, graph: ThreadGraph) -> _Timeline:
        return self._timelines.setdefault(id(graph), _Timeline(graph))

    def generate(self, request: Request) -> Stream:
        """Begin to replay the sample that the request's fork path names."""
        timeline = self._timeline(request.graph)
        stream = Stream(lambda: self._cancel(timeline, request.node.id), request.chunk)
        try:
            sample = self._choose(timeline, request)
        except UsageError as error:
            stream.fail(error)
            return stream
        most = request.sampling.max_tokens
        count = sample.sampled_tokens if most is None else min(most, sample.sampled_tokens)
        playing = _Playing(request, stream, sample, timeline.clock.now(), count)
        timeline.live[request.node.id] = playing
        playing.end = timeline.clock.call_at(
            playing.began + count / self.rate, lambda: self._end(timeline, request.node.id)
        )
        if request.chunk == 1:
            self._plan_look(timeline, playing)
        return stream

    def _choose(self, timeline: _Timeline, request: Request) -> Recorded:
        """The sample of a request.

        Raises:
            UsageError: there is none, or the request asks for what a recorded sample cannot be.
        """
        path = request.path
        self._check_context(request)
        if len(path) > 1:
            raise CapabilityError(
                f"{self.name} numbers its samples by one fork index, and a thread was forked {len(path)} times "
                f"(path {path}); use a local: engine"
            )
        if path and request.repeat:
            raise UsageError(
                f"{self.name}: fork k is sample k, so that repeat {request.repeat} of a strategy that forks would be "
                "repeat 0 again; use --repeats 1"
            )
        number = path[0] if path else request.repeat
        key = self.recording.find(request.item)
        sample = self.recording.sample(key, number)
        if number in timeline.used:
            raise UsageError(
                f"sample {number} of item {'/'.join(key)!r} was asked for twice in one run, once by a fork and once "
                "without; fork all samples"
            )
        _check_sampling(request, sample, f"sample {number} of item {'/'.join(key)!r}")
        timeline.used.add(number)
        return sample

    def _check_context(self, request: Request) -> None:
        graph, node = request.graph, request.node
        for before in (*(graph.nodes[i] for i in graph.view(node.context)), node):
            for span in before.spans:
                if span.origin != "prompt" and (span.count or span.text):
                    what = "after a sampled thread" if span.origin == "sampled" else "after text that a strategy writes"
                    raise CapabilityError(f"{self.name} cannot go on {what}: {_INSTEAD}")

    def _decoded(self, timeline: _Timeline, playing: _Playing) -> int:
        elapsed = timeline.clock.now() - playing.began
        return min(playing.count, int(elapsed * self.rate + _ROUNDING))

    def _push(self, playing: _Playing, tokens: int, finish_reason: str | None = None) -> None:
        self._sampled += playing.push(tokens, finish_reason)

    def _end(self, timeline: _Timeline, node: int) -> None:
        """A generation comes to its end. First the others tell how far they are: whoever compares them needs both."""
        ended = timeline.live[node]
        depth = ended.request.depth + ended.count
        place = bisect_left(timeline.depths, depth)
        if timeline.depths[place : place + 1] != [depth]:
            insort(timeline.depths, depth)
        self._drop(timeline, node)
        self._look(timeline)
        whole = ended.count == ended.sample.sampled_tokens
        self._push(ended, ended.count, ended.sample.finish_reason if whole else "length")

    def _look(self, timeline: _Timeline) -> None:
        """Tell everyone who watches how far the generations are now."""
        if timeline.look is not None:
            timeline.look.cancel()
        for playing in timeline.watched:
            self._push(playing, self._decoded(timeline, playing))
            self._plan_look(timeline, playing)

    def _plan_look(self, timeline: _Timeline, playing: _Playing) -> None:
        """Look again when that can decide something about a generation.

        A delta for each token would be exact, and slow. But who is ahead by tokens changes only where this chain
        draws level with one that has ended, or passes it by one token (equal ones are ranked by index).
        """
        depths, here = timeline.depths, playing.request.depth + self._decoded(timeline, playing)
        level, passed = bisect_right(depths, here), bisect_left(depths, here)
        after = min([*depths[level : level + 1], *(depth + 1 for depth in depths[passed : passed + 1])], default=None)
        if after is None or (tokens := after - playing.request.depth) >= playing.count:
            return
        when, planned = playing.began + tokens / self.rate, timeline.look
        if planned is None or planned.callback is None or when < planned.when:
            if planned is not None:
                planned.cancel()
            timeline.look = timeline.clock.call_at(when, lambda: self._look(timeline))

    def _drop(self, timeline: _Timeline, node: int) -> _Playing:
        playing = timeline.live.pop(node)
        if playing.end is not None:
            playing.end.cancel()
        if not timeline.live and timeline.look is not None:
            timeline.look.cancel()
        return playing

    def _cancel(self, timeline: _Timeline, node: int) -> None:
        if node in timeline.live:
            playing = self._drop(timeline, node)
            self._push(playing, self._decoded(timeline, playing), "cancelled")

    async def release(self, graph: ThreadGraph) -> None:
        """See `Engine.release`."""
        timeline = self._timelines.pop(id(graph), None)
        if timeline is not None:
            for node in list(timeline.live):
                self._cancel(timeline, node)

    async def close(self) -> None:
        """See `Engine.close`."""
        for timeline in list(self._timelines.values()):
            await self.release(timeline.graph)

    def load(self) -> Load:
        """Generations that are being replayed, and tokens of all that there were."""
        return Load(requests=sum(len(t.live) for t in self._timelines.values()), sampled_tokens=self._sampled)

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""
        return {
            "engine": "replay",
            "file": self.recording.name,
            "fingerprint": self.recording.fingerprint,
            "rate": self.rate,
            "records": len(self.recording),
            "items": len(self.recording.items),
        }


_INSTEAD = "recorded samples cannot be continued; use a local: engine"


def _check_sampling(request: Request, sample: Recorded, what: str) -> None:
    """Refuse settings under which this sample could not have come out; how it was drawn was fixed when it was."""
    sampling = request.sampling
    for name in ("stop_ids", "logprobs", "top_logprobs"):
        if getattr(sampling, name):
            raise CapabilityError(f"a replayed sample has no token ids and log-probabilities: no {name} for {what}")
    if sampling.ignore_eos and sample.finish_reason == "stop":
        raise CapabilityError(f"{what} ended by itself: ignore_eos cannot be honoured; use a local: engine")
    for stop in sampling.stop:
        if 0 <= sample.text.find(stop) < len(sample.text) - len(stop):
            raise CapabilityError(
                f"{what} was recorded without the stop string {stop!r} and goes on after it; record with it, or use a "
                "local: engine"
            )
