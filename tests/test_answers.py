"""The default answer, and what of a text is thinking."""

from __future__ import annotations

import pytest

from orchestra.answers import extract_answer, last_boxed, split_reasoning


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is \\boxed{42}", "42"),
        ("\\boxed{1} no, \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{ {a} {b} }", "{a} {b}"),
        ("\\boxed{7} and then \\boxed{unclosed", "7"),
        ("3 then 5\nAnswer: C\nbye 9", "C"),
        ("The final answer is: 12 apples", "12 apples"),
        ("answer: 1 + 2 = 3 , 3 * 4 = 12", "1 + 2 = 3 , 3 * 4 = 12"),
        ("answer: 4\nanswer: none", None),
        ("we get 1,234.5 or -7", "-7"),
        ("total 1,234.5", "1234.5"),
        ("about 3/4", "3/4"),
        ("yes\nno it is not", "no it is not"),
        ("<think>maybe 3</think>It is 4", "4"),
        ("maybe 3</think>It is 4", "4"),
        ("<think>is it 3 or", None),
        ("<think>3</think>", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_default_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_reasoning() -> None:
    assert split_reasoning("<think>a</think>b") == ("a", "b", True)
    assert split_reasoning("<think>a") == ("a", "", False)
    assert split_reasoning("b") == ("", "b", True)


def test_long_and_nested_texts_take_bounded_time() -> None:
    assert last_boxed("\\boxed{" * 2000) is None
    assert extract_answer("9" * 1_000_000) is not None
    assert extract_answer("{" * 100_000 + "\\boxed{" + "{" * 10_000) is not None
