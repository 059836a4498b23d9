"""A scripted engine: it plays given texts, one token a tick, for exact tests of control flow.

It is a fake, and for state machines only: what a strategy does to a model is tested on a real engine.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestra.errors import PromptError
from orchestra.graph import Span, ThreadGraph
from orchestra.runtime.engine import Capability, Delta, Engine, Load, Prompt, Request, Stream

Script = Callable[[str, tuple[int, ...]], str]
"""From the context's text and the fork path to what the model says; `$` at its end is the end of sequence."""

EOS = "$"


@dataclass(eq=False)
class _Playing:
    request: Request
    stream: Stream
    words: list[str]
    said: int = 0
    text: str = ""


class ScriptedEngine(Engine):
    """Plays `script`. A token is a word with the white space before it; every live request says one a tick.

    Attributes:
        requests: all requests so far, in order.
    """

    name = "scripted"
    capabilities = frozenset(Capability) - {Capability.SCORE, Capability.TOP_LOGPROBS}

    def __init__(self, script: Script, *, reuse_join: bool = True) -> None:
        if not reuse_join:
            self.capabilities = self.capabilities - {Capability.REUSE_JOIN}
        self.requests: list[Request] = []
        self.released: list[ThreadGraph] = []
        self._script = script
        self._ids: dict[str, int] = {}
        self._live: list[_Playing] = []
        self._sampled = 0
        self._player: asyncio.Task[None] | None = None

    def _span(self, origin: Any, text: str) -> Span:
        words = re.findall(r"\s*\S+|\s+$", text)
        ids = [self._ids.setdefault(word, len(self._ids)) for word in words]
        return Span(origin, ids, len(ids), text)

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        """Words of the text, or of the messages one after the other."""
        text = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        if not text.strip():
            raise PromptError("the prompt is empty")
        return self._span("prompt", text)

    async def encode(self, text: str) -> Span:
        """Words."""
        return self._span("forced", text)

    def generate(self, request: Request) -> Stream:
        """Play what the script says to this context."""
        graph, node = request.graph, request.node
        view = {**graph.view(node.context), node.id: len(node)}
        words = {index: word for word, index in self._ids.items()}
        context = "".join(words[token] for n, length in view.items() for token in graph.nodes[n].tokens[:length])
        reply = re.findall(r"\s*\S+|\s+$", self._script(context, request.path))
        playing = _Playing(request, Stream(lambda: self._cancel(playing), request.chunk), reply)
        self.requests.append(request)
        self._live.append(playing)
        if self._player is None or self._player.done():
            self._player = asyncio.ensure_future(self._play())
        return playing.stream

    def _cancel(self, playing: _Playing) -> None:
        if playing in self._live:
            self._live.remove(playing)
            playing.stream.push(Delta(finish_reason="cancelled"))

    async def _play(self) -> None:
        while self._live:
            for playing in list(self._live):
                delta = self._tick(playing)
                if delta.finish_reason:
                    self._live.remove(playing)
                playing.stream.push(delta)
            for _ in range(10):  # let every reader, and the program behind it, run before the next tick
                await asyncio.sleep(0)

    def _tick(self, playing: _Playing) -> Delta:
        sampling = playing.request.sampling
        word = playing.words[playing.said] if playing.said < len(playing.words) else EOS
        eos = word.endswith(EOS)
        text = "" if eos and word.strip() == EOS else word.removesuffix(EOS)
        playing.said += 1
        self._sampled += 1
        playing.text += text
        delta = Delta([self._ids.setdefault(text, len(self._ids))], 1, text, [-1.0], eos=eos and not text)
        delta.matched = next((stop for stop in sampling.stop if stop in playing.text), None)
        if eos or delta.matched is not None:
            delta.finish_reason = "stop"
        elif playing.said == sampling.max_tokens:
            delta.finish_reason = "length"
        return delta

    async def release(self, graph: ThreadGraph) -> None:
        """Cancel what still runs of the run."""
        self._live = [playing for playing in self._live if playing.request.graph is not graph]
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
