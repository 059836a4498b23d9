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


def test_majority_ignores_those_without_an_answer_and_breaks_ties_by_order() -> None:
    votes = [" answer: none $", " answer: 3 $", " answer: none $", " ANSWER: 4 $", " answer:  4 $"]
    outcome = run("self_consistency(samples=5)", replies(*votes))
    assert outcome.answer == "4"
    assert [c.answer for c in outcome.candidates] == [None, "3", None, "4", "4"]
    assert run("self_consistency(samples=2)", replies(" answer: 8 $", " answer: 9 $")).answer == "8"
    assert run("self_consistency(samples=2)", replies(" answer: none $")).answer is None


@pytest.mark.parametrize(("first", "answer", "path"), [(1, "1", 3), (2, "1", 4), (3, "2", 6), (4, "2", 7)])
def test_first_finish_votes_over_the_first_k(first: int, answer: str, path: int) -> None:
    """In the order of the finish the answers are 1, 2, 2, 2: of the first two the earlier one wins the tie."""
    script = replies(" x x x answer: 2 $", " answer: 1 $", " x answer: 2 $", " x x x x answer: 2 $")
    outcome = run(f"first_finish(samples=4, first={first})", script)
    assert outcome.answer == answer
    assert outcome.usage.critical_path_tokens == path
    assert len(outcome.candidates) == first


def test_samples_are_drawn_at_the_usual_temperature_unless_somebody_says_otherwise() -> None:
    for spec, settings, expected in [
        ("sample", {}, 0.0),
        ("sample(temperature=0.3)", {"temperature": 0.7}, 0.3),
        ("sample", {"temperature": 0.7}, 0.7),
        ("self_consistency(samples=2)", {}, 0.6),
        ("self_consistency(samples=2)", {"temperature": 0.7}, 0.7),
        ("self_consistency(samples=2, drafts=sample(temperature=0.3))", {"temperature": 0.7}, 0.3),
        ("self_consistency(samples=2, drafts=spawn_join)", {}, 0.6),
    ]:
        engine = ScriptedEngine(replies(" x $"))
        run(spec, replies(), engine=engine, **settings)
        assert {request.sampling.temperature for request in engine.requests} == {expected}, spec


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
