"""Adaptive parallel reasoning: control flow counted by hand, and whatever a parent may write."""

from __future__ import annotations

import pytest
from playing import play

from orchestra.protocols import APR, apr, transcript
from orchestra.testing.scripted import ScriptedEngine

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
    outcome = play("spawn_join(children=2)", engine, PROMPT)
    assert outcome.answer == STEPS
    assert outcome.text == transcript(outcome.graph)
    rounds = [part for part in APR.parse(outcome.text).parts if isinstance(part, apr.Round)]
    assert [(len(one.spawned), one.results) for one in rounds] == [(2, [None, None]), (1, [STEPS])]
    assert [str(problem) for problem in APR.validate(outcome.text)] == ["4:1: not a child: spawn: broken line"]
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
    outcome = play("spawn_join", lambda *_: turn, PROMPT)
    assert outcome.graph.count("sampled") > 0


def test_spawn_join_that_never_answers_ends_after_its_rounds() -> None:
    outcome = play(
        "spawn_join(rounds=3)", lambda _, path: " x $" if path else " spawn: 3 + 7 = 10 left: 8\n join:", PROMPT
    )
    assert outcome.usage.requests == 3 + 3 + 1


def test_when_a_budget_ends_in_a_child_the_parents_text_is_there() -> None:
    spawns = " spawn: 3 + 7 = 10 left: 8 10 12\n join:"
    outcome = play("spawn_join", lambda _, path: " x" * 99 if path else spawns, PROMPT, budget="sampled_tokens=20")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.text.endswith("join:")


def test_the_text_of_a_search_reads_back_however_it_is_cut() -> None:
    text = (
        apr.header() + " spawn: 3 + 7 = 10 left: 8 10 12\n spawn: 8 - 3 = 5 left: 7 12\n join:\n"
        f" none\n {STEPS}\n answer: {STEPS}\n"
    )
    whole = APR.parse(text)
    assert APR.render(whole) == text
    assert APR.validate(text) == []
    for cut in range(len(text)):
        reader = APR.reader()
        forks = [reader.feed(text[:cut]), reader.feed(text[cut:])]
        assert [[branch.label for branch in fork.branches] for fork in forks if fork] == [["1", "2"]]
        assert reader.close() == whole
    assert [str(p) for p in APR.validate(" join:\n")] == ["1:1: a join without children"]
    assert [str(p) for p in APR.validate(" spawn: 3 + 7 = 10 left: 8\n join:\n")] == [
        "3:1: 1 children have handed nothing back"
    ]
