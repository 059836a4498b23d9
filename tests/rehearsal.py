"""Plays, rehearsed: what a strategy comes to, token by token, with a model that says just what the script says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conftest import byte_tokenizer
from plays import TAGS, Play
from tokenizers import AddedToken

import orchestra
from orchestra.graph import Span
from orchestra.outcome import Outcome
from orchestra.runtime.engine import Delta, Engine, Prompt, Request, Stream
from orchestra.runtime.local.detokenize import Detokenizer, Finder
from orchestra.runtime.local.prompts import Prompts
from orchestra.testing.scripted import EOS as SCRIPTED_EOS
from orchestra.testing.scripted import Script, ScriptedEngine, _Playing

CONTEXT, VOCABULARY, BOS, EOS, PAD = 2048, 320, 1, 2, 0


def tokenizer(*, special: bool = False) -> Any:
    """Bytes, and the tags as tokens of their own.

    Args:
        special: whether the tags are special tokens, which decoding skips unless told otherwise.
    """
    made = byte_tokenizer(merges=False)
    if special:
        made.add_special_tokens({"additional_special_tokens": list(TAGS)})
    else:
        made.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    assert len(made) <= VOCABULARY, f"{len(made)} tokens; make VOCABULARY larger"
    return made


@dataclass(eq=False)
class _Reciting(_Playing):
    ids: Sequence[int] = ()
    detokenizer: Any = None
    finder: Any = None


class Rehearsal(ScriptedEngine):
    """A scripted engine that says tokens of the speaker's tokenizer, one a simulated second, and ends as engines do."""

    name = "rehearsal"

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self._prompts = Prompts(tokenizer(), CONTEXT)

    async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
        return self._prompts.prompt(prompt, **template)

    async def encode(self, text: str) -> Span:
        return self._prompts.forced(text)

    def generate(self, request: Request) -> Stream:
        graph, node, stops = request.graph, request.node, request.sampling.stop
        view = {**graph.view(node.context), node.id: len(node)}
        context = [token for n, length in view.items() for token in graph.nodes[n].tokens[:length]]
        said = self._script(self._prompts.decode(context), request.path).removesuffix(SCRIPTED_EOS)
        clock = self.clock(graph)
        stream = Stream(lambda: self._cancel(playing), request.chunk)
        playing = _Reciting(
            request,
            stream,
            "",
            [],
            clock,
            clock.now(),
            ids=[*self._prompts.forced(said).tokens, EOS],
            detokenizer=Detokenizer(self._prompts.decode, context),
            finder=Finder(stops) if stops else None,
        )
        self.requests.append(request)
        self._live.append(playing)
        self._wait(playing)
        return stream

    def _next(self, playing: Any) -> Delta:
        sampling, token = playing.request.sampling, playing.ids[playing.said]
        playing.said += 1
        self._sampled += 1
        eos, full = token == EOS, playing.said == sampling.max_tokens
        text = playing.detokenizer.push([] if eos else [token], eos or full)
        delta = Delta([token], 1, text, [-1.0], eos=eos)
        if token in sampling.stop_ids:
            delta.matched = token
        elif playing.finder is not None and text:
            delta.matched = playing.finder.feed(text)
        delta.finish_reason = "stop" if eos or delta.matched is not None else "length" if full else None
        return delta


async def perform(engine: Engine, play: Play, **settings: Any) -> Outcome:
    """Run a play on an engine, greedily."""
    async with orchestra.connect(engine) as connection:
        return await connection.run(play.strategy, play.prompt, temperature=0, **play.settings, **settings)


def rehearse(play: Play) -> Outcome:
    """The outcome of a play: what it is with a model that says just what the script says."""
    return orchestra.run(play.strategy, play.prompt, engine=Rehearsal(play.script), temperature=0, **play.settings)
