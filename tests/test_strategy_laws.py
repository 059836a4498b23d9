"""The laws of strategies, on the built-in ones: played by a script, and for real on the embedded model."""

from __future__ import annotations

import asyncio

import pytest

from orchestra import Outcome, Thread, strategy
from orchestra.runtime.connect import open_engine
from orchestra.testing.scripted import ScriptedEngine, words
from orchestra.testing.strategies import check_strategy

PROMPT = "numbers: 3 7 8 12 target: 54"
BUILT_IN = [
    "sample",
    "sample(temperature=1)",
    "self_consistency(samples=4)",
    "first_finish(samples=4)",
    "first_finish(samples=4, first=2)",
    "best_of(samples=4)",
    "spawn_join",
    "spawn_join(children=4)",
    "first_finish(samples=3, drafts=spawn_join)",
]


@pytest.mark.parametrize("spec", BUILT_IN)
def test_on_the_embedded_model(spec: str) -> None:
    async def main() -> Outcome:
        engine = open_engine("demo")
        try:
            return await asyncio.wait_for(check_strategy(engine, spec, PROMPT, max_tokens=600), 120)
        finally:
            await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize("spec", [s for s in BUILT_IN if "spawn" not in s])
def test_on_a_script(spec: str) -> None:
    lengths = words([9, 5, 7, 30])
    asyncio.run(check_strategy(ScriptedEngine(lambda _, path: lengths[path[-1] if path else 0]), spec, "go"))


def test_a_strategy_that_depends_on_the_clock_is_caught() -> None:
    runs = iter(range(1000))

    @strategy
    async def moody(thread: Thread) -> Thread:
        return await thread.generate(max_tokens=2 + next(runs))

    with pytest.raises(AssertionError, match="depends on the schedule"):
        asyncio.run(check_strategy(ScriptedEngine(lambda *_: words(500)[0]), moody(), "go"))
