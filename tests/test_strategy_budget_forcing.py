"""Budget forcing: thinking that is cut off, made longer, or left alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import orchestra
from orchestra import Outcome
from orchestra.errors import CapabilityError
from orchestra.graph import Edge
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Capability
from orchestra.testing import check_agreement
from orchestra.testing.scripted import Script, ScriptedEngine
from orchestra.testing.strategies import check_strategy

CUE = "\n</think>\n\nFinal Answer:"


def thinker(context: str, _: tuple[int, ...]) -> str:
    """Thinks three words, one more whenever it has to wait, and answers with the number of its waits."""
    if "</think>" in context:
        return f" {context.count('Wait')} $"
    return " t u </think>" if context.endswith("Wait") else " a b c </think>"


def run(spec: str, script: Script = thinker, engine: ScriptedEngine | None = None, **settings: Any) -> Outcome:
    engine = engine or ScriptedEngine(script)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(spec, "go", **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    outcome.graph.check_integrity()
    assert outcome.usage.sampled_tokens == outcome.usage.critical_path_tokens == engine.load().sampled_tokens
    return outcome


def test_left_alone_it_thinks_and_answers() -> None:
    outcome = run("budget_forcing")
    assert outcome.text == " a b c </think> 0"
    assert outcome.usage.sampled_tokens == 4 + 2
    assert outcome.usage.forced_tokens == 0


@pytest.mark.parametrize("extensions", [1, 2, 5])
def test_the_end_of_thinking_is_taken_back(extensions: int) -> None:
    """The tag is counted where it was sampled, but nothing that comes after attends to it."""
    engine = ScriptedEngine(thinker)
    outcome = run(f"budget_forcing(extensions={extensions}, wait=' Wait')", engine=engine)
    assert outcome.text == " a b c  Wait" + " t u  Wait" * (extensions - 1) + f" t u </think> {extensions}"
    assert outcome.answer == str(extensions)
    assert outcome.usage.sampled_tokens == 4 + 3 * extensions + 2
    assert outcome.usage.requests == extensions + 2
    asked = engine.requests
    assert asked[1].node.context == [Edge(asked[0].node.id, 3)]
    assert [r.node.text.count("</think>") for r in asked] == [1] * (extensions + 1) + [0]
    # Each call reads what stands: prompt, words, waits; 1 for the space before the tag, whose token is gone.
    reads = [1] + [1 + 3 + 2 + k * (2 + 2) for k in range(extensions)]
    last = reads[-1] + 3
    thought = [4] + [3] * extensions
    assert outcome.usage.sequential_tokens == sum(reads) + sum(thought) + last + 2


@pytest.mark.parametrize(
    ("spec", "text", "thought"),
    [
        ("thinking_tokens=2", " a b" + CUE + " 0", 2),
        ("thinking_tokens=3", " a b c" + CUE + " 0", 3),
        ("thinking_tokens=4", " a b c </think> 0", 4),
        ("thinking_tokens=4, extensions=3", " a b c </think> 0", 4),  # nothing is left to think with
        ("thinking_tokens=5, extensions=3, wait=' Wait'", " a b c  Wait t" + CUE + " 1", 5),
        ("thinking_tokens=9, extensions=1, wait=' Wait'", " a b c  Wait t u </think> 1", 7),
        ("thinking_tokens=2, cue='', end='</think>'", " a b\n</think> 0", 2),
    ],
)
def test_thinking_is_cut_off(spec: str, text: str, thought: int) -> None:
    outcome = run(f"budget_forcing({spec})")
    assert outcome.text == text
    assert outcome.usage.sampled_tokens == thought + 2


def test_a_model_that_never_thinks_just_answers() -> None:
    for spec in ("budget_forcing(extensions=2)", "budget_forcing(thinking_tokens=9)"):
        outcome = run(spec, lambda *_: " it is 4 $")
        assert (outcome.text, outcome.answer, outcome.usage.requests) == (" it is 4", "4", 1)


def test_a_model_that_stops_after_having_to_wait_is_asked_for_its_answer() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        return " 7 $" if "Final" in context else " $" if "Wait" in context else " a </think>"

    outcome = run("budget_forcing(extensions=1)", script)
    assert outcome.text == " a Wait" + CUE + " 7"


def test_other_tags_and_the_runs_own_limit() -> None:
    outcome = run("budget_forcing(end='<done>', extensions=1)", lambda c, _: " 3 $" if "<done>" in c else " a <done>")
    assert outcome.text == " a Wait a <done> 3"
    assert run("budget_forcing", max_tokens=2).text == " a b" + CUE + " 0"


def test_greedy_unless_told_otherwise() -> None:
    for spec, settings, expected in [
        ("budget_forcing(extensions=1)", {}, 0.0),
        ("budget_forcing(extensions=1)", {"temperature": 0.3}, 0.3),
        ("self_consistency(samples=2, drafts=budget_forcing)", {}, 0.6),
    ]:
        engine = ScriptedEngine(thinker)

        async def main(engine: ScriptedEngine = engine, spec: str = spec, settings: Any = settings) -> None:
            async with orchestra.connect(engine) as connection:
                await connection.run(spec, "go", **settings)

        asyncio.run(main())
        assert {r.sampling.temperature for r in engine.requests} == {expected}


def test_budgets_leave_what_there_is() -> None:
    for tokens, text in [
        (2, " a b"),
        (4, " a b c </think>"),
        (6, " a b c Wait t u"),
        (8, " a b c  Wait t u </think> 1"),
    ]:
        outcome = run("budget_forcing(extensions=1, wait=' Wait')", budget=f"sampled_tokens={tokens}")
        assert outcome.text.replace("  ", " ") == text.replace("  ", " ")
        assert outcome.stopped_by == "sampled_tokens"
    assert run("budget_forcing(extensions=1)", budget="wall_seconds=5").text == " a b c </think>"


def test_an_engine_that_cannot_is_named() -> None:
    engine = ScriptedEngine(thinker)
    engine.capabilities -= {Capability.CUT}
    run("budget_forcing(thinking_tokens=2)", engine=engine)
    with pytest.raises(CapabilityError, match="budget_forcing needs cut"):
        run("budget_forcing(extensions=1)", engine=engine)
    engine.capabilities -= {Capability.CONTINUE}
    with pytest.raises(CapabilityError, match="needs continue"):
        run("budget_forcing", engine=engine)


SPECS = [
    "budget_forcing(thinking_tokens=9, extensions=2)",
    "self_consistency(samples=3, drafts=budget_forcing(extensions=2))",
]


@pytest.mark.parametrize("spec", SPECS)
def test_laws_on_a_script(spec: str) -> None:
    asyncio.run(check_strategy(ScriptedEngine(thinker), spec, "go"))


@pytest.mark.parametrize("spec", [s.replace("extensions=2", "extensions=2, end='e'") for s in SPECS])
def test_laws_on_a_real_model(tiny: str, spec: str) -> None:
    """Any letter is a tag to a model that says anything."""

    async def main() -> Outcome:
        engine = open_engine(f"local:{tiny}")
        try:
            return await asyncio.wait_for(check_strategy(engine, spec, "what is it", max_tokens=60), 120)
        finally:
            await engine.close()

    outcome = asyncio.run(main())
    assert outcome.usage.requests > 1


COUNTDOWN = "budget_forcing(extensions=2, end='miss', wait='left:', thinking_tokens=200, cue='')"
"""Words that the embedded model knows: to it a first miss is the end of thinking."""


PROBLEM = "numbers: 3 7 8 12 target: 54"


def test_on_the_embedded_model() -> None:
    async def main() -> Outcome:
        engine = open_engine("demo")
        try:
            return await asyncio.wait_for(check_strategy(engine, COUNTDOWN, PROBLEM, max_tokens=60), 120)
        finally:
            await engine.close()

    outcome = asyncio.run(main())
    before, tag, _ = outcome.text.partition("miss")
    assert tag
    assert before.count("left:") >= 2, "the first misses were not taken back"
    assert outcome.usage.requests >= 3


def test_on_a_server(sglang_server: Any) -> None:
    """It cuts at the same tokens as the engine in this process."""

    async def main() -> bool:
        engines = [open_engine("demo"), open_engine(f"sglang://127.0.0.1:{sglang_server.port}")]
        try:
            return await asyncio.wait_for(check_agreement(*engines, COUNTDOWN, PROBLEM, max_tokens=60), 120)
        finally:
            for engine in engines:
                await engine.close()

    asyncio.run(main())
