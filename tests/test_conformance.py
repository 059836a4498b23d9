"""The conformance suite passes on engines that need no server, and finds what an engine does wrong."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from orchestra.errors import PromptError
from orchestra.graph import Span
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Capability, Delta, Engine, Load, Request, Stream
from orchestra.testing import check_engine
from orchestra.testing.scripted import ScriptedEngine

REPLY = " so we try 3 and 7 which is 10 and then 10 and 8 which is 18 $"


def scripted(context: str, path: tuple[int, ...]) -> str:
    """One fixed reply, gone on with from wherever it was left."""
    for at in range(len(REPLY), -1, -1):
        if context.endswith(REPLY[:at]):
            return REPLY[at:]
    return REPLY


def checked(engine: Engine, **options: Any) -> list[str]:
    async def main() -> list[str]:
        try:
            return await check_engine(engine, **options)
        finally:
            await engine.close()

    return asyncio.run(asyncio.wait_for(main(), 120))


def test_on_the_embedded_model() -> None:
    assert len(checked(open_engine("demo"))) == 23  # all of them


def test_on_recorded_samples(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    record = {"task": "t", "id": "1", "text": "it is 4", "sampled_tokens": 20, "finish_reason": "stop"}
    file.write_text("".join(json.dumps({**record, "repeat": k}) + "\n" for k in range(3)))
    assert "cancelled_after_a_token" in checked(open_engine(f"replay:{file}"), item="1")


class Fake(ScriptedEngine):
    """Keeps the protocol, but for what its subclasses do; without seeds, which a script does not have."""

    capabilities = frozenset({Capability.CONTINUE, Capability.LOGPROBS})

    def __init__(self) -> None:
        super().__init__(scripted)


def test_a_scripted_engine_keeps_it() -> None:
    assert {"stops", "continues", "forced_text", "logprobs"} <= set(checked(Fake()))


class CountsWrong(Fake):
    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        delta.count += 1
        return delta


class Forgets(Fake):
    def load(self) -> Load:
        return Load(requests=len(self._live))


class TakesEmptyPrompts(Fake):
    async def encode_prompt(self, prompt: Any, **template: Any) -> Span:
        return self._span("prompt", prompt or "nothing")


class IgnoresLimits(Fake):
    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        if delta.finish_reason == "length":
            delta.finish_reason = None
        return delta


class IgnoresStops(Fake):
    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        if delta.matched is not None:
            delta.matched = None
            delta.finish_reason = delta.finish_reason if delta.eos else None
        return delta


class StartsAnew(Fake):
    """Goes on from the prompt, whatever stands after it."""

    def __init__(self) -> None:
        ScriptedEngine.__init__(self, lambda *_: REPLY)


class NeverEnds(Fake):
    """Keeps what has ended, and goes on with it when it is cancelled."""

    def _drop(self, playing: Any) -> None:
        if playing.timer is not None:
            playing.timer.cancel()


class ForgetsReaders(Fake):
    """Drops a run without ending its streams."""

    async def release(self, graph: Any) -> None:
        for playing in [playing for playing in self._live if playing.request.graph is graph]:
            self._drop(playing)


class EndsTwice(Fake):
    def generate(self, request: Request) -> Stream:
        stream = super().generate(request)
        stream.push(Delta([0], 1, "", finish_reason="stop"))
        return stream


class NoLogprobs(Fake):
    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        delta.logprobs = []
        return delta


class DependsOnOthers(Fake):
    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        if len(self._live) > 1:
            delta.text = delta.text.upper()
        return delta


class Misspells(Fake):
    async def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        return (await super().decode(ids)).replace("so", "os")


class Nameless(Fake):
    def facts(self) -> dict[str, Any]:
        return {}


class IgnoresBias(Fake):
    capabilities = Fake.capabilities | {Capability.LOGIT_BIAS}


class IgnoresGrammars(Fake):
    capabilities = Fake.capabilities | {Capability.GRAMMAR}


class ReportsWhatItDrewFrom(Fake):
    """Its model gives every word a log-probability of -1; penalised ones have less."""

    capabilities = Fake.capabilities | {Capability.SCORE, Capability.PENALTIES}

    async def score(self, graph: Any, node: Any) -> list[float]:
        return [-1.0 if node.context or i else 0.0 for i in range(len(node))]

    def _next(self, playing: Any) -> Delta:
        delta = super()._next(playing)
        if playing.request.sampling.needs:
            delta.logprobs = [-1.5] * delta.count
        return delta


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (CountsWrong, "tokens and count differ"),
        (Forgets, r"load\(\) counts"),
        (TakesEmptyPrompts, "was not refused"),
        (IgnoresLimits, "tokens with max_tokens"),
        (IgnoresStops, "stopped by None"),
        (StartsAnew, "in two parts it says"),
        (NeverEnds, r"load\(\) counts"),
        (ForgetsReaders, "never ends"),
        (EndsTwice, "."),
        (NoLogprobs, "0 log-probabilities"),
        (DependsOnOthers, "beside others it says"),
        (Misspells, "it decodes its tokens to"),
        (Nameless, "do not name the engine"),
        (IgnoresBias, "which is banned"),
        (IgnoresGrammars, "with a regex that only"),
        (ReportsWhatItDrewFrom, "with penalties at temperature 0.0 reported and scored log-probabilities differ"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_it_finds(kind: type[Fake], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestra.testing.conformance._SECONDS", 0.5)
    with pytest.raises(AssertionError, match=message):
        checked(kind())


def test_a_prompt_that_the_engine_refuses_is_the_callers_mistake() -> None:
    with pytest.raises(PromptError, match="vocabulary"):
        checked(open_engine("demo"), prompt="What is the capital of France?")


def test_a_scripted_engine_with_log_probabilities_of_words_keeps_it() -> None:
    """It says the likeliest word: one more than the last."""

    def top(context: str, position: int) -> dict[str, float]:
        count = position % 50
        return {f" w{count}": -0.1, f" v{count}": -3.0, " $": -4.0}

    engine = ScriptedEngine(top=top)
    engine.capabilities -= {Capability.SEED}
    assert {"logprobs", "top_logprobs", "decodes"} <= set(checked(engine))
