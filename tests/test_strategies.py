"""What each built-in strategy does, played by a scripted engine and counted by hand."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import orchestra
from orchestra import BestOf, Outcome
from orchestra.protocols import apr
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


def test_best_of_prefers_an_answer_then_the_score() -> None:
    texts = replies(" answer: none $", " answer: bb $", " answer: aaaa $")
    assert run(BestOf(samples=3, reward=len), texts).answer == "aaaa"
    assert run(BestOf(samples=3, reward=lambda text: -len(text)), texts).answer == "bb"
    lengths = replies(" answer: 1 long $", " answer: 2 $")  # the scripted engine gives every token -1 nat
    assert run("best_of(samples=2, scorer='logprob')", lengths).answer == "2"
    assert run("best_of(samples=2, scorer='mean_logprob')", lengths).answer == "1 long"


PROMPT = "numbers: 3 7 8 12 target: 54"
STEPS = "3 + 7 = 10 , 8 - 3 = 5 , 5 * 10 = 50"


def test_spawn_join_over_two_rounds() -> None:
    """Parent 9 + 9 tokens and a join tag each, children 3 and 13 tokens at most, then a last turn of 18."""

    def script(context: str, path: tuple[int, ...]) -> str:
        if path:
            return f" answer: {STEPS} $" if "8 / 4" in context else " answer: none $"
        if STEPS in context:
            return f" answer: {STEPS} $"
        if "none" in context:
            return " spawn: 8 / 4 = 2 left: 1 2 3\n join:"
        return " spawn: 3 + 7 = 10 left: 8 10 12\n spawn: broken line\n spawn: 7 - 3 = 4 left: 4 8 12\n join:"

    engine = ScriptedEngine(script)
    outcome = run("spawn_join(children=2)", script, PROMPT, engine=engine)
    assert outcome.answer == STEPS
    assert outcome.text.count("join:") == 2
    parent = [r for r in engine.requests if not r.path]
    children = [r for r in engine.requests if r.path]
    assert len(parent) == 3
    assert [r.path for r in children] == [(0,), (1,), (2,)]
    assert (
        children[0].graph.nodes[children[0].node.context[0].parent].text == " step: 3 + 7 = 10 left: 8 10 12 target: 54"
    )
    assert outcome.graph.nodes[1].spans[0].text == apr.header(2)
    turns = [r.node.count("sampled") for r in parent]
    kids = [r.node.count("sampled") for r in children]
    assert outcome.usage.critical_path_tokens == sum(turns) + max(kids[:2]) + kids[2]
    assert "\n none\n none\n" in outcome.text
    assert outcome.usage.sampled_tokens == sum(turns) + sum(kids)


@pytest.mark.parametrize(
    "turn",
    [
        " join:",
        " spawn: nonsense\n join:",
        " spawn: 3 + 7 = 10 left: 8 10 12",
        " answer: 5 $",
        " $",
        "spawn: " * 50 + "join:",
    ],
)
def test_spawn_join_ends_on_any_malformed_turn(turn: str) -> None:
    outcome = run("spawn_join", lambda *_: turn, PROMPT)
    assert outcome.graph.count("sampled") > 0


def test_spawn_join_that_never_answers_ends_after_its_rounds() -> None:
    outcome = run(
        "spawn_join(rounds=3)", lambda _, path: " x $" if path else " spawn: 3 + 7 = 10 left: 8\n join:", PROMPT
    )
    assert outcome.usage.requests == 3 + 3 + 1


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
