"""Sequential refinement: what each round is shown, when it stops, and what it costs."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any

import pytest

import orchestra
from orchestra import Outcome
from orchestra.runtime.connect import open_engine
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy

CHECK = "Do not answer again now"


def size(text: str) -> int:
    return len(re.findall(r"\s*\S+|\s+$", text))


class Script:
    """Answers 1, 2, 3, ... (or what it is told), and checks; remembers what every call was shown."""

    def __init__(self, *answers: str, check: str = " <think> x </think> wrong sign $") -> None:
        self.answers, self.check = iter(answers), check
        self.shown: list[str] = []
        self.checks: list[str] = []
        self.engine = ScriptedEngine(self.say)

    def say(self, context: str, path: tuple[int, ...]) -> str:
        (self.checks if CHECK in context else self.shown).append(context)
        return self.check if CHECK in context else next(self.answers)

    def run(self, spec: str, prompt: Any = "go", **settings: Any) -> Outcome:
        async def main() -> Outcome:
            async with orchestra.connect(self.engine, settings.pop("engines", None)) as connection:
                return await connection.run(spec, prompt, **settings)

        return asyncio.run(asyncio.wait_for(main(), 20))


def test_each_round_sees_the_last_answer_without_its_thinking() -> None:
    script = Script(" <think> hm </think> first 1 $", " second 2 $", " <think> so </think> third 3 $")
    outcome = script.run("refine(rounds=2)")
    start, second, third = script.shown
    assert start == "go"
    assert second.startswith("go\n\nAn earlier answer to this was:\n\nfirst 1\n\nCorrect")
    assert third == second.replace("first 1", "second 2"), "earlier answers, or a workspace, are passed on"
    assert (outcome.answer, outcome.text) == ("3", " <think> so </think> third 3")
    assert [c.answer for c in outcome.candidates] == ["3", "2", "1"]
    tokens = [6, 3, 6]
    assert outcome.usage.critical_path_tokens == outcome.usage.sampled_tokens == sum(tokens)
    expected = (1 + size(second) + size(third)) + sum(tokens)
    assert outcome.usage.sequential_tokens == outcome.usage.total_tokens == expected
    assert {r.sampling.temperature for r in script.engine.requests} == {0.0}


def test_a_check_of_its_own_comes_before_each_refinement() -> None:
    script, judge = Script(" one 1 $", " two 2 $", " three 3 $"), Script()
    outcome = script.run("refine(rounds=2, critique=True, engine='judge')", engines={"judge": judge.engine})
    assert script.checks == []
    assert [c.split("\n\n")[2] for c in judge.checks] == ["one 1", "two 2"]
    for context, answer in zip(script.shown[1:], ("one 1", "two 2"), strict=True):
        assert f"was:\n\n{answer}\n\nA check of it found:\n\nwrong sign\n\nCorrect" in context
    assert outcome.usage.critical_path_tokens == 3 * 3 + 2 * 6
    calls = [(size(c), 3) for c in script.shown] + [(size(c), 6) for c in judge.checks]
    assert outcome.usage.sequential_tokens == sum(given + said for given, said in calls)
    assert outcome.usage.requests == 5


@pytest.mark.parametrize("check", ["$", " <think> never ends"])
def test_a_check_that_says_nothing_is_left_out(check: str) -> None:
    script = Script(" one 1 $", " two 2 $", check=check)
    assert script.run("refine(rounds=1, critique=True)", max_tokens=20).answer == "2"
    assert "check of it" not in script.shown[-1]


@pytest.mark.parametrize(
    ("patience", "answers", "calls"),
    [
        (None, "1 1 1 1 1", 5),
        (1, "1 1 1 1 1", 2),
        (2, "1 1 1 1 1", 3),
        (2, "1 1 2 2 2", 5),
        (1, "1 2 3 4 4", 5),
        (3, "1 2 2 2 2", 5),
        (1, "none none none none 1", 5),
    ],
)
def test_stops_when_the_answer_stays(patience: int | None, answers: str, calls: int) -> None:
    script = Script(*(f" answer: {answer} $" for answer in answers.split()))
    outcome = script.run(f"refine(rounds=4, patience={patience})".replace("None", "null"))
    assert outcome.usage.requests == calls
    assert outcome.answer == answers.split()[calls - 1]


def test_what_has_no_solution_is_not_passed_on() -> None:
    script = Script(" one 1 $", " <think> for ever", " three 3 $")
    assert script.run("refine(rounds=2)").answer == "3"
    assert script.shown[1] == script.shown[2]
    script = Script(" <think> for ever", " two 2 $", " <think> for ever")
    outcome = script.run("refine(rounds=2)")
    assert script.shown[:2] == ["go", "go"]
    assert outcome.answer == "2", "the last round has no answer"


def test_budgets_leave_the_last_whole_answer() -> None:
    for budget, answer in [
        ("sampled_tokens=2", None),  # the first answer is cut before its number
        ("sampled_tokens=3", "1"),
        ("sampled_tokens=5", "1"),
        ("critical_path_tokens=6", "2"),
        ("requests=2", "2"),
        ("wall_seconds=8.5", "2"),
        ("sampled_tokens=9", "3"),
    ]:
        outcome = Script(" answer: 1 $", " answer: 2 $", " answer: 3 $").run("refine(rounds=2)", budget=budget)
        assert outcome.answer == answer or (answer is None and outcome.finish_reason == "length"), budget
        assert bool(outcome.stopped_by) == (answer != "3"), budget


def test_chats_and_nesting() -> None:
    script = Script(*[" x 5 $"] * 6)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    outcome = script.run("refine(rounds=1, drafts=self_consistency(samples=3))", messages)
    assert outcome.answer == "5"
    assert outcome.usage.requests == 6
    assert outcome.usage.critical_path_tokens == 3 + 3
    assert all(context.startswith("Be brief.\ngo") for context in script.shown)


FOREVER: Callable[[str, Any], str] = lambda context, _: f" x{len(context) % 7} y answer: {len(context)} $"  # noqa: E731
SPECS = ["refine(rounds=2)", "refine(rounds=2, critique=True, patience=1)"]


@pytest.mark.parametrize("spec", SPECS)
def test_laws_on_a_script(spec: str) -> None:
    asyncio.run(check_strategy(ScriptedEngine(FOREVER), spec, "go"))


@pytest.mark.parametrize("spec", SPECS)
def test_laws_on_a_real_model(tiny: str, spec: str) -> None:
    async def main() -> Outcome:
        engine = open_engine(f"local:{tiny}")
        try:
            return await asyncio.wait_for(check_strategy(engine, spec, "what is it", max_tokens=12), 120)
        finally:
            await engine.close()

    assert len(asyncio.run(main()).candidates) == 3
