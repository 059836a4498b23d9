"""Map and reduce by prompting: the plan, its parts, and the synthesis."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.runtime.connect import open_engine
from orchestra.strategies.prompted_map_reduce import parse_plan, prompted
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy

PLAN = " <think> 1. no 2. no </think> 1. count cats\n2. count dogs\n3. count cats\n4. count birds $"


@strategy
async def planned(thread: Thread, parts: int = 2, expand_tokens: int | None = None) -> Thread:
    return await prompted(thread, parts=parts, expand_tokens=expand_tokens)


def size(text: str) -> int:
    return len(re.findall(r"\s*\S+|\s+$", text))


class Script:
    """Plans as it is told, works on each part, and puts it together; remembers what every call was shown."""

    def __init__(
        self, plan: str = PLAN, part: str = " <think> hm </think> {} it is 2 $", whole: str = " all 9 $"
    ) -> None:
        self.plan, self.part, self.whole = plan, part, whole
        self.shown: list[str] = []
        self.engine = ScriptedEngine(self.say)

    def say(self, context: str, path: tuple[int, ...]) -> str:
        self.shown.append(context)
        if "Do not answer this yet" in context:
            return self.plan
        if found := re.search(r"Do part (\d+) only", context):
            return self.part.format("x " * int(found[1]))
        return self.whole if "put them together" in context else " directly 5 $"

    def run(self, spec: Any, prompt: Any = "go", **settings: Any) -> Outcome:
        async def main() -> Outcome:
            async with orchestra.connect(self.engine) as connection:
                return await connection.run(spec, prompt, **settings)

        return asyncio.run(asyncio.wait_for(main(), 20))


def test_plan_parts_and_synthesis() -> None:
    """The plan has 16 tokens, its parts 7 and 8 words (with the end of sequence), the synthesis 3."""
    script = Script()
    outcome = script.run("planned(parts=2)")
    plan, one, two, end = script.shown
    assert plan.startswith("go\n\nDo not answer this yet.")
    assert "at most 2" in plan
    listed = "go\n\nThe work on this is split into parts:\n\n1. count cats\n2. count dogs\n\n"
    assert one.startswith(f"{listed}Do part 1 only")
    assert one.endswith("count cats")
    assert two.startswith(f"{listed}Do part 2 only")
    assert two.endswith("count dogs")
    assert "Part 1: count cats\nx  it is 2\n\nPart 2: count dogs\nx x  it is 2\n\n" in end
    assert "hm" not in end
    assert (outcome.text, outcome.answer) == (" all 9", "9")
    said = [size(PLAN), 8, 9, 3]
    assert [r.node.count("sampled") for r in script.engine.requests] == said
    assert outcome.usage.critical_path_tokens == said[0] + 9 + 3
    shown = list(map(size, script.shown))
    assert outcome.usage.sequential_tokens == shown[0] + said[0] + max(shown[1] + 8, shown[2] + 9) + shown[3] + 3
    assert outcome.usage.total_tokens == sum(shown) + sum(said)
    assert {r.sampling.max_tokens for r in script.engine.requests} == {None}


@pytest.mark.parametrize(
    "plan", ["$", " I cannot $", " 1. only one $", " 1. same\n2. Same $", " <think> 1. a\n2. b", " 1.x\n2.y $"]
)
def test_without_two_parts_it_answers_directly(plan: str) -> None:
    script = Script(plan)
    outcome = script.run("planned")
    assert (outcome.text, outcome.usage.requests) == (" directly 5", 2)
    assert script.shown[-1] == "go"


def test_without_results_it_answers_directly() -> None:
    outcome = Script(part=" <think> for ever").run("planned(parts=3)")
    assert (outcome.text, outcome.usage.requests) == (" directly 5", 5)


def test_a_part_without_result_is_said_to_have_none() -> None:
    script = Script()
    script.engine = ScriptedEngine(lambda c, p: " <think> hm" if "Do part 2" in c else script.say(c, p))
    script.run("planned")
    assert "Part 2: count dogs\n(no result)" in script.shown[-1]


def test_many_parts_and_limits() -> None:
    script = Script(" " + "\n".join(f"{i % 400}. part {i}" for i in range(1000)) + " $")
    outcome = script.run("planned(parts=5, expand_tokens=3)", max_tokens=5000)
    assert outcome.usage.requests == 1 + 5 + 1
    parts = [r for r in script.engine.requests if "Do part" in r.graph.nodes[r.node.context[0].parent].text]
    assert [r.sampling.max_tokens for r in parts] == [3] * 5
    assert sorted(r.sampling.max_tokens for r in script.engine.requests)[-2:] == [5000, 5000]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. a\n2) b\n 3: c d ", ["a", "b", "c d"]),
        ("**1.** a\n**2. b**", ["a", "b**"]),
        ("Plan:\n1. a\n- b\n\n2. b", ["a", "b"]),
        ("1. A\n2. a\n3. b", ["A", "b"]),
        ("1. \n2.\n3. x", ["x"]),
        ("10000. x", []),
        ("1. " + "x" * 10_000, ["x" * 500]),
        ("1." * 50_000, []),
        (" " * 100_000 + "1. x", []),
        ("\n".join(f"{i}. p{i}" for i in range(1, 1000)), [f"p{i}" for i in range(1, 5)]),
        ("", []),
    ],
)
def test_plans_are_parsed(text: str, expected: list[str]) -> None:
    assert parse_plan(text, 4) == expected


def test_budgets_leave_the_parts() -> None:
    script = Script()
    outcome = script.run("planned", budget="requests=3")
    assert outcome.text == "x  it is 2\n\nx x  it is 2"
    assert outcome.answer == "2"
    assert outcome.stopped_by == "requests"
    assert Script().run("planned", budget="requests=1").stopped_by == "requests"


def test_chats() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "go"}]
    script = Script()
    assert script.run("planned", messages).answer == "9"
    assert all(context.startswith("Be brief.\ngo\n\n") for context in script.shown)


def test_laws_on_a_script() -> None:
    asyncio.run(check_strategy(Script().engine, "planned", "go"))


def test_laws_on_a_real_model(tiny: str) -> None:
    async def main() -> Outcome:
        engine = open_engine(f"local:{tiny}")
        try:
            return await asyncio.wait_for(check_strategy(engine, "planned", "what is it", max_tokens=12), 120)
        finally:
            await engine.close()

    assert asyncio.run(main()).usage.requests >= 2
