"""The spawn/join language: what is rendered parses back, and nothing that a model writes can raise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.evaluation.countdown import generate
from orchestra.protocols import apr
from orchestra.training.demonstrations import spawn_join

WORDISH = st.lists(
    st.sampled_from([*"+-*/=,x\n", "spawn:", "join:", "left:", "answer:", "target:", "none", "3", "12", "1" * 30]),
    max_size=60,
).map(" ".join)


def test_header() -> None:
    assert apr.header() == "\n children: free\n"
    assert apr.header(4) == "\n children: 4\n"
    with pytest.raises(ValueError, match="at least 1"):
        apr.header(0)


def test_parent_turns_parse_to_their_children() -> None:
    rng = random.Random(0)
    for level in ("small", "hard"):
        for instance in generate(level, "dev", 30):
            parent, children = spawn_join(instance, rng, rng.choice([None, 3]))
            turns = [segment.text for segment in parent.segments if segment.learn]
            lines = [line for turn in turns for line in apr.parse_spawn(turn)]
            assert [apr.child_prompt(line, parent.text) for line in lines] == [one.segments[0].text for one in children]
            given_back = [segment.text for segment in parent.segments[1:] if not segment.learn]
            results = [apr.child_result(one.text) for one in children]
            assert "".join(given_back) == "".join(
                apr.render_join(results[start : start + len(apr.parse_spawn(turn))])
                for start, turn in zip(_starts(turns), turns[:-1], strict=True)
            )


def _starts(turns: list[str]) -> list[int]:
    starts = [0]
    for turn in turns[:-2]:
        starts.append(starts[-1] + len(apr.parse_spawn(turn)))
    return starts


def test_malformed_spawn_lines_are_skipped() -> None:
    turn = """
 spawn: 7 + 3 = 10 left: 8 10 12
 spawn: 7 + 3 = left: 8 10 12
 spawn: 8 + 3 = 11 left:
 spawning nothing
  spawn:  8 + 3 =  11 left: 7 11 12
 join: spawn: 8 - 3 = 5 left: 5 7 12
 spawn: 8 * 3 = 24 left: 7 12 24
"""
    assert apr.parse_spawn(turn) == ["7 + 3 = 10 left: 8 10 12", "8 + 3 = 11 left: 7 11 12"]


def test_spawn_lines_are_bounded() -> None:
    assert len(apr.parse_spawn(" spawn: 7 + 3 = 10 left: 8 10 12\n" * 10_000)) == apr.MAX_CHILDREN


def test_child_result() -> None:
    steps = "7 + 3 = 10 , 10 * 8 = 80 , 80 - 12 = 68"
    assert apr.child_result(f" step: 7 + 3 = 10\n answer: {steps}") == steps
    assert apr.child_result(f" answer: none answer:  {steps}\n") == steps
    assert apr.child_result(" answer: none") is None
    assert apr.child_result(" answer: 7 + 3 = 10 ,") is None  # cut off
    assert apr.child_result(f" {steps}") is None


def test_render_join() -> None:
    assert apr.render_join([None, "7 + 3 = 10"]) == "\n none\n 7 + 3 = 10\n"
    assert apr.render_join([]) == "\n"


def test_child_prompt_takes_the_first_target() -> None:
    parent = " numbers: 3 7 8 12 target: 54\n children: free\n target: 99"
    assert apr.child_prompt("7 + 3 = 10 left: 8 10 12", parent) == " step: 7 + 3 = 10 left: 8 10 12 target: 54"
    assert apr.child_prompt("7 + 3 = 10 left: 8 10 12", "nothing") == " step: 7 + 3 = 10 left: 8 10 12"


@given(st.one_of(st.text(), WORDISH), st.one_of(st.text(), WORDISH))
def test_no_text_raises(text: str, other: str) -> None:
    for line in apr.parse_spawn(text):
        assert "\n" not in apr.child_prompt(line, other)
    result = apr.child_result(text)
    assert result is None or "\n" not in result
