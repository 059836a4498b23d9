"""What each built-in strategy does, played by a scripted engine and counted by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import orchestra
from orchestra import Outcome
from orchestra.errors import CapabilityError
from orchestra.runtime.engine import Capability
from orchestra.testing.scripted import Script, ScriptedEngine, replies


def run(
    spec: Any, script: Script, prompt: str = "go", engine: ScriptedEngine | None = None, **settings: Any
) -> Outcome:
    engine = engine or ScriptedEngine(script)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(spec, prompt, **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens
    return outcome


def test_a_missing_capability_is_named_with_an_engine_that_has_it() -> None:
    engine = ScriptedEngine(replies(" x $"))
    engine.capabilities -= {Capability.LOGPROBS, Capability.CONTINUE}
    with pytest.raises(CapabilityError, match=r"best_of needs logprobs.*local:"):
        run("best_of", replies(), engine=engine)
    with pytest.raises(CapabilityError, match="self_consistency needs continue"):
        run("self_consistency(drafts=spawn_join)", replies(), engine=engine)


PROMPT = "numbers: 3 7 8 12 target: 54"
STEPS = "3 + 7 = 10 , 8 - 3 = 5 , 5 * 10 = 50"


def test_strategies_nest() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        if len(path) > 1:
            return f" answer: {STEPS} $"
        return f" answer: {STEPS} $" if STEPS in context else " spawn: 3 + 7 = 10 left: 8 10 12\n join:"

    outcome = run("self_consistency(samples=3, drafts=spawn_join)", script, PROMPT)
    assert outcome.answer == STEPS
    assert len(outcome.candidates) == 3
    assert outcome.usage.requests == 9
    assert sum(c.tokens for c in outcome.candidates) == outcome.usage.sampled_tokens
