"""ThreadWeaver: control flow counted by hand, and the published token string."""

from __future__ import annotations

import pytest
from playing import after, play

from orchestra.protocols import THREAD_WEAVER, transcript
from orchestra.testing.scripted import ScriptedEngine

PLAN = " <think>Hm. <Parallel>\n<Outlines>\n<Outline>1: A</Outline>\n<Outline>2: B</Outline>\n</Outlines>"  # 8 tokens
ENDS = ("</Thread>\n", "</Parallel> so</think> answer: 5 $")  # 5 tokens with the end
SCRIPT = after(
    ENDS,
    ("<Thread>\n1:", " a b</Thread>"),  # 2 tokens
    ("<Thread>\n2:", " a b c</Thread>"),  # 3 tokens
    ("go", PLAN),
)


def test_two_threads() -> None:
    """Plan 8, threads 2 and 3, the rest 5; the text is the published one, its line breaks included."""
    outcome = play("threads", SCRIPT)
    assert outcome.text == transcript(outcome.graph)
    assert (
        outcome.text
        == PLAN + "\n<Thread>\n1: a b</Thread><Thread>\n2: a b c</Thread>\n</Parallel> so</think> answer: 5"
    )
    assert THREAD_WEAVER.validate(outcome.text) == []
    assert outcome.answer == "5"
    assert outcome.usage.sampled_tokens == 8 + 2 + 3 + 5
    assert outcome.usage.critical_path_tokens == 8 + 3 + 5
    assert outcome.usage.sequential_tokens == (1 + 8) + (1 + 8 + 1 + 2 + 3) + (1 + 8 + 1 + 2 + 2 + 2 + 3 + 1 + 5)
    assert outcome.usage.requests == 4


def test_threads_see_the_text_so_far_and_nothing_of_each_other_and_the_parent_sees_all_of_them() -> None:
    contexts: dict[str, str] = {}

    def script(context: str, path: tuple[int, ...]) -> str:
        contexts[context[-4:]] = context
        return SCRIPT(context, path)

    play("threads", script)
    assert contexts["d>\n1:"[-4:]] == "go" + PLAN + "\n<Thread>\n1:"
    assert contexts["d>\n2:"[-4:]] == "go" + PLAN + "\n<Thread>\n2:"
    assert contexts["ad>\n"] == "go" + PLAN + "\n<Thread>\n1: a b</Thread><Thread>\n2: a b c</Thread>\n"


def test_the_join_is_one_causal_context_on_every_engine() -> None:
    for reuse in (True, False):
        graph = play("threads", ScriptedEngine(SCRIPT, reuse_join=reuse)).graph
        assert all(len(node.context) < 2 for node in graph.nodes)


@pytest.mark.parametrize(("cut", "said"), [(" a b $", " a b\n</Thread>"), (" x x x x x x x", " x x x\n</Thread>")])
def test_a_thread_that_ends_or_is_cut_off_is_closed_and_the_parent_goes_on(cut: str, said: str) -> None:
    outcome = play("threads(thread_tokens=3)", after(ENDS, ("1:", cut), ("2:", " b</Thread>"), ("go", PLAN)))
    assert f"<Thread>\n1:{said}<Thread>\n2: b</Thread>\n</Parallel>" in outcome.text
    assert THREAD_WEAVER.validate(outcome.text) == []
    assert outcome.answer == "5"


def test_blocks_are_not_nested() -> None:
    inner = " <Parallel>\n<Outlines>\n<Outline>1: C</Outline>\n</Outlines> c</Thread>"
    engine = ScriptedEngine(after(ENDS, ("1:", inner), ("2:", " b</Thread>"), ("go", PLAN)))
    outcome = play("threads", engine)
    assert outcome.answer == "5"
    assert len(engine.requests) == 4
    assert [p.message for p in THREAD_WEAVER.validate(outcome.text)][:1] == ["<Parallel> inside a block"]


def test_several_blocks_and_duplicate_labels() -> None:
    again = "</Parallel> <Parallel><Outlines><Outline>1: x</Outline><Outline>1: y</Outline></Outlines>"

    def script(context: str, path: tuple[int, ...]) -> str:
        if context.endswith("</Thread>\n"):
            return again if context.count("<Outlines>") == 1 else ENDS[1]
        return after(("1:", " a</Thread>"), ("2:", " b</Thread>"), ("go", PLAN))(context, path)

    outcome = play("threads", script)
    assert [len(block.paths) for block in THREAD_WEAVER.parse(outcome.text).blocks] == [2, 1]
    assert outcome.answer == "5"


def test_a_plan_without_outlines_stays_sequential() -> None:
    turn = " <Parallel><Outlines></Outlines> answer: 5 $"
    outcome = play("threads", lambda context, _: turn if context == "go" else turn[len(context) - 2 :])
    assert outcome.answer == "5"
    assert "<Thread>" not in outcome.text


def test_when_a_budget_ends_the_parents_text_is_there() -> None:
    outcome = play("threads", SCRIPT, budget="sampled_tokens=9")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.text == PLAN
