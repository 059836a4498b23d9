"""A scripted engine: it plays given texts, one token a simulated second, for exact tests of control flow.

It is a fake, and for state machines only: what a strategy does to a model is tested on a real engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestra.errors import PromptError
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.clock import SimulatedClock, Timer
from orchestra.runtime.engine import Capability, Delta, Engine, Gang, Load, Prompt, Request, Stream

Top = Callable[[str, int], Mapping[str, float]]
"""From the text so far and a token's position on its path to `{word: log-probability}`; `$` is the end of sequence."""
Script = Callable[[str, tuple[int, ...]], str]
"""From the context's text and the fork path to what the model says; `$` at its end is the end of sequence."""

EOS = "$"


@dataclass(eq=False)
class _Playing:
    request: Request
    stream: Stream
    context: str
    words: list[str]
    clock: SimulatedClock
    began: float
    said: int = 0
    text: str = ""
    timer: Timer | None = None


class _Arrangement(Gang):
    """Workers are heard, but nobody waits for anybody: a script is told what there is when a step begins."""

    def __init__(self) -> None:
        self.views: dict[int, Sequence[Edge]] = {}

    def arrange(self, views: Mapping[int, Sequence[Edge]], settled: int = 0) -> None:
        self.views |= views

    def leave(self) -> None:
        pass


class ScriptedEngine(Engine):
    """Plays `script`. A token is a word with the white space before it; every live request says `rate` a second.

    Nobody waits for those seconds: each run has a simulated clock, which its budgets and races read.

    Args:
        script: what it says.
        reuse_join: whether it can join by reuse.
        rate: tokens a request says in a simulated second.
        top: log-probabilities of words; without a script it says the likeliest (the first of equals).

    Attributes:
        requests: all requests so far, in order.
    """

    name = "scripted"
    capabilities = frozenset(Capability) - {
        Capability.SCORE,
        Capability.LOCK_STEP,
        Capability.TOP_LOGPROBS,
        Capability.PENALTIES,
        Capability.LOGIT_BIAS,
        Capability.GRAMMAR,
    }

    def __init__(
        self, script: Script | None = None, *, reuse_join: bool = True, rate: float = 1.0, top: Top | None = None
    ) -> None:
        if not reuse_join:
            self.capabilities = self.capabilities - {Capability.REUSE_JOIN}
        if top is not None:
            self.capabilities = self.capabilities | {Capability.TOP_LOGPROBS}
        self.requests: list[Request] = []
        self.released: list[ThreadGraph] = []
        self._script, self._top = script, top
        self._ids: dict[str, int] = {"": 0}  # by word; that of the end is empty
        self._rate = rate
        self._live: list[_Playing] = []
        self._sampled = 0
        self._clocks: dict[int, tuple[ThreadGraph, SimulatedClock]] = {}  # by identity: graphs are compared by content

    def _span(self, origin: Any, text: str) -> Span:
        words = re.findall(r"\s*\S+|\s+$", text)
        ids = [self._id(word) for word in words]
        return Span(origin, ids, len(ids), text)

    def _id(self, word: str) -> int:
        return self._ids.setdefault("" if word.strip() == EOS else word, len(self._ids))

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """Words of the text, or of the messages one after the other."""
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        if not text.strip():
            raise PromptError("the prompt is empty")
        return self._span("prompt", text)

    async def encode(self, text: str) -> Span:
        """Words."""
        return self._span("forced", text)

    async def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Words."""
        words = list(self._ids)  # ids count up
        return "".join(words[token] for token in ids)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The one whose word is empty."""
        return frozenset({0})

    def generate(self, request: Request) -> Stream:
        """Play what the script says to this context."""
        graph, node = request.graph, request.node
        view: list[Edge] = [Edge(*read) for read in graph.view(node.context).items()]
        if isinstance(request.gang, _Arrangement):
            view = [Edge(n, length or len(graph.nodes[n])) for n, length in request.gang.views[node.id]]
        words = {index: word for word, index in self._ids.items()}
        read = [*view, Edge(node.id, len(node))]
        context = "".join(words[token] for n, length in read for token in graph.nodes[n].tokens[:length])
        reply = re.findall(r"\s*\S+|\s+$", self._script(context, request.path)) if self._script else []
        clock = self.clock(graph)
        stream = Stream(lambda: self._cancel(playing), request.chunk)
        playing = _Playing(request, stream, context, reply, clock, clock.now())
        self.requests.append(request)
        self._live.append(playing)
        self._wait(playing)
        return stream

    def gang(self, graph: ThreadGraph, members: int) -> Gang:
        """Workers who hear each other, not in lock-step."""
        return _Arrangement()

    def clock(self, graph: ThreadGraph) -> SimulatedClock:
        """The run's own clock, from 0."""
        return self._clocks.setdefault(id(graph), (graph, SimulatedClock()))[1]

    def _cancel(self, playing: _Playing) -> None:
        if playing in self._live:
            due = playing.timer is not None and playing.timer.when <= playing.clock.now()
            delta = self._next(playing) if due else Delta()  # a word of this very moment has been said
            delta.finish_reason = "cancelled"
            self._drop(playing)
            playing.stream.push(delta)

    def _drop(self, playing: _Playing) -> None:
        self._live.remove(playing)
        if playing.timer is not None:
            playing.timer.cancel()

    def _wait(self, playing: _Playing) -> None:
        when = playing.began + (playing.said + 1) / self._rate
        playing.timer = playing.clock.call_at(when, lambda: self._say(playing))

    def _say(self, playing: _Playing) -> None:
        delta = self._next(playing)
        if delta.finish_reason:
            self._drop(playing)
        else:
            self._wait(playing)
        playing.stream.push(delta)

    def _next(self, playing: _Playing) -> Delta:
        sampling = playing.request.sampling
        word = playing.words[playing.said] if playing.said < len(playing.words) else EOS
        top: Mapping[str, float] = {}
        if self._top is not None:
            node = playing.request.node
            before = node.start + len(node) - node.count("sampled") + playing.said
            top = self._top(playing.context + playing.text, before)
            word = word if self._script else max(top, key=lambda word: top[word])
        eos = word.endswith(EOS)
        text = "" if eos and word.strip() == EOS else word.removesuffix(EOS)
        playing.said += 1
        self._sampled += 1
        playing.text += text
        delta = Delta([self._id(text)], 1, text, [top.get(word, -1.0)], eos=eos and not text)
        if sampling.tempered:
            delta.tempered = list(delta.logprobs)
        if self._top is not None and sampling.top_logprobs:
            best = sorted(top, key=lambda word: -top[word])[: sampling.top_logprobs]
            delta.top = [{self._id(word): top[word] for word in best}]
        delta.matched = next((stop for stop in sampling.stop if stop in playing.text), None)
        if eos or delta.matched is not None:
            delta.finish_reason = "stop"
        elif playing.said == sampling.max_tokens:
            delta.finish_reason = "length"
        return delta

    async def release(self, graph: ThreadGraph) -> None:
        """Cancel what still runs of the run."""
        for playing in [playing for playing in self._live if playing.request.graph is graph]:
            self._cancel(playing)
        self._clocks.pop(id(graph), None)
        self.released.append(graph)

    def load(self) -> Load:
        """Live requests and tokens said."""
        return Load(requests=len(self._live), sampled_tokens=self._sampled)


def replies(*texts: str) -> Script:
    """A script that answers fork index k (the last of the path) with text k; more forks start again from the first."""
    return lambda _, path: texts[(path[-1] if path else 0) % len(texts)]


def words(count: Sequence[int] | int) -> list[str]:
    """Replies of so many words each, ended by end-of-sequence."""
    return ["".join(f" w{i}" for i in range(n - 1)) + f" {EOS}" for n in ([count] if isinstance(count, int) else count)]
