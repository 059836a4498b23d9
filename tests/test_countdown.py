"""Countdown: splits, levels, the exact checker against brute force, answer extraction."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.evaluation.countdown import (
    LEVELS,
    Instance,
    can_reach,
    generate,
    guess,
    moves,
    openings,
    reachable,
    solve,
    split_of,
)
from orchestra.evaluation.countdown_check import check, extract_answer

NUMBERS = st.lists(st.integers(1, 50), min_size=4, max_size=4)


@pytest.mark.parametrize("level", LEVELS)
def test_instances_are_distinct_repeatable_and_follow_the_level(level: str) -> None:
    rule = LEVELS[level]
    instances = generate(level, "dev", 200, seed=3)
    assert instances == generate(level, "dev", 200, seed=3)
    assert instances != generate(level, "dev", 200, seed=4)
    assert len(set(instances)) == 200
    for one in instances:
        assert one.split == "dev"
        assert list(one.numbers) == sorted(one.numbers)
        assert one.numbers[-1] <= rule.largest
        assert one.numbers[-1] > rule.above
        assert 10 <= one.target <= 99
        assert 1 <= len(openings(one.numbers, one.target)) <= 4


def test_the_first_instances_never_change() -> None:
    # Figures in the README and the model card are about these; another machine must draw the same ones.
    assert [one.id for one in generate("small", "test", 3)] == [
        "small-1-4-5-13-90",
        "small-3-6-9-10-23",
        "small-9-9-10-15-84",
    ]
    assert [one.id for one in generate("hard", "test", 3)] == [
        "hard-8-11-16-20-32",
        "hard-33-35-42-48-36",
        "hard-1-3-12-36-23",
    ]


def test_levels_and_splits_are_disjoint() -> None:
    drawn = {
        (level, split): {(one.numbers, one.target) for one in generate(level, split, 300, seed)}
        for level in LEVELS
        for split, seed in (("train", 0), ("dev", 1), ("test", 2))
    }
    for first, second in itertools.combinations(drawn.values(), 2):
        assert not first & second


@given(NUMBERS, st.integers(10, 99), st.randoms())
def test_split_ignores_the_order_of_numbers(numbers: list[int], target: int, rng: random.Random) -> None:
    shuffled = list(numbers)
    rng.shuffle(shuffled)
    assert split_of(numbers, target) == split_of(shuffled, target)


def test_split_shares() -> None:
    shares = Counter(split_of((a, b, c, 9), 50) for a in range(20) for b in range(20) for c in range(20))
    assert 0.88 < shares["train"] / 8000 < 0.92
    assert 0.04 < shares["dev"] / 8000 < 0.06


@pytest.mark.parametrize(
    ("level", "split", "number", "message"),
    [
        ("medium", "dev", 1, "small, hard"),
        ("small", "eval", 1, "train, dev, test"),
        ("small", "dev", -1, "negative"),
        ("small", "dev", 10**6, "too few"),
    ],
)
def test_bad_requests_get_a_clear_line(level: str, split: str, number: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(level, split, number)  # type: ignore[arg-type]


def every_value(values: tuple[Fraction, ...]) -> set[Fraction]:
    """All values of expressions over all of `values` whose intermediate values are whole and in 1..99."""
    if len(values) == 1:
        return set(values)
    found: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(values)), 2):
        rest = tuple(value for k, value in enumerate(values) if k not in (i, j))
        for result in (values[i] + values[j], values[i] - values[j], values[i] * values[j], values[i] / values[j]):
            if result.denominator == 1 and 1 <= result <= 99:
                found |= every_value((*rest, result))
    return found


@given(st.lists(st.integers(1, 50), min_size=2, max_size=3))
def test_reachable_equals_brute_force(numbers: list[int]) -> None:
    expected = {int(value) for value in every_value(tuple(map(Fraction, numbers)))}
    assert set(reachable(tuple(sorted(numbers)))) == expected


@given(NUMBERS, st.integers(10, 99))
def test_solve_finds_a_solution_exactly_when_there_is_one(numbers: list[int], target: int) -> None:
    steps = solve(numbers, target)
    assert (steps is not None) == can_reach(tuple(sorted(numbers)), target)
    if steps is not None:
        assert check(numbers, target, " , ".join(map(str, steps)))


def test_serial_symbolic_search_solves_every_instance() -> None:
    assert all(solve(one.numbers, one.target) for level in LEVELS for one in generate(level, "dev", 100))


def test_guessing_is_rarely_right() -> None:
    rng = random.Random(0)
    rate = sum(guess(one, rng) for one in generate("small", "dev", 500) for _ in range(4)) / 2000
    assert 0.002 < rate < 0.03


RIGHT = [
    "3 + 7 = 10 , 10 * 8 = 80 , 80 - 12 = 68",
    "7 + 3 = 10\n8 * 10 = 80\n80-12=68",
    "3+7=10; 10*8=80; 80-12=68",
    "(3 + 7) * 8 - 12",
    "(3+7)*8-12 = 68",
    "8 \\times (7 + 3) - 12",
    "((((7+3)))*8)−12",
]
WRONG = [
    "",
    "none",
    "68",
    "3 + 7 = 10 , 10 * 8 = 80",
    "3 + 7 = 10 , 10 * 8 = 80 , 80 - 12 = 67",
    "3 + 7 = 11 , 11 * 8 = 88 , 88 - 12 = 76",
    "3 + 7 = 10 , 10 * 8 = 80 , 80 - 12 = 68 , 68 - 0 = 68",
    "3 + 7 = 10 , 3 * 8 = 24 , 80 - 12 = 68",
    "80 - 12 = 68",
    "(3 + 7) * 8 - 12 = 69",
    "(3 + 7) * 8 - 12 + 0",
    "(3 + 7) * 8 - 12)",
    "((3 + 7) * 8 - 12",
    "3 7 8 12",
    "68 = 68",
    "(3 + 7) * 8 - 1 2",
    "__import__('os')",
    "3 + 7 ** 8 - 12",
    "٣ + 7 = 10 , 10 * 8 = 80 , 80 - 12 = 68",
]


@pytest.mark.parametrize("answer", RIGHT)
def test_right_answers(answer: str) -> None:
    assert check([3, 7, 8, 12], 68, answer)
    assert not check([3, 7, 8, 12], 67, answer)
    assert not check([3, 7, 8, 11], 68, answer)
    assert not check([3, 7, 8, 12, 12], 68, answer)


@pytest.mark.parametrize("answer", WRONG)
def test_wrong_answers(answer: str) -> None:
    assert not check([3, 7, 8, 12], 68, answer)


def test_published_semantics() -> None:
    assert check([5, 5, 7], 7, "5 - 5 = 0 , 7 + 0 = 7")  # zero is allowed
    assert not check([3, 5, 9], 7, "3 - 5 = -2 , 9 + -2 = 7")  # negative values are not
    assert not check([3, 5, 9], 7, "3 - 5 + 9")  # nor within an expression
    assert not check([7, 2, 4], 14, "7 / 2 * 4")  # division is exact at every step
    assert check([7, 2, 4], 14, "7 * 4 / 2")
    assert not check([4, 4], 1, "4 / 0 = 1")
    assert check([1, 5, 8], 4, "8 - 5 + 1")
    assert check([1, 5, 8], 2, "8 - (5 + 1)")


@given(st.text(alphabet="0123456789+-*/()=, \n\\boxed{}answer:none", max_size=60))
def test_checker_and_extraction_never_raise(text: str) -> None:
    check([3, 7, 8, 12], 68, text)
    answer = extract_answer(text)
    assert answer is None or answer.strip() == answer


@given(NUMBERS, st.integers(10, 99), st.integers(0, 2), st.integers(1, 9))
def test_a_changed_result_is_wrong(numbers: list[int], target: int, place: int, change: int) -> None:
    steps = solve(numbers, target)
    if steps is not None:
        lines = [str(step) for step in steps]
        lines[place] = f"{lines[place].partition('=')[0]}= {steps[place].result + change}"
        assert not check(numbers, target, " , ".join(lines))


@pytest.mark.parametrize("text", ["(" * 10**6, "9" * 10**6, "1+" * 10**6, "(1+" * 600, "1*" * 900 + "1", "=" * 10**6])
def test_adversarial_answers_take_no_time(text: str) -> None:
    started = time.monotonic()
    assert not check([1, 2, 3, 4], 24, text)
    extract_answer("answer: " * 10**4 + "\\boxed{" * 10**4 + text)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" numbers: 3 7 8 12 target: 68 answer: 3 + 7 = 10 , 10 * 8 = 80", "3 + 7 = 10 , 10 * 8 = 80"),
        (" answer: 1 + 1 = 2 answer: none", None),
        ("no tag", None),
        ("answer:", None),
        ("Answer: none.", None),
        ("so \\boxed{(3+7)*8-12} holds", "(3+7)*8-12"),
        ("answer: none, wait: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{1} then answer: 2 + 3", "2 + 3"),
        ("**Answer:** (3+7)*8-12 = 68\nThis uses every number.", "(3+7)*8-12 = 68"),
        ("Answer:\n3 + 7 = 10\n10 * 8 = 80\n80 - 12 = 68\n\nDone.", "3 + 7 = 10\n10 * 8 = 80\n80 - 12 = 68"),
        ("\\boxed{1", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_prompt_and_id() -> None:
    one = Instance((3, 7, 8, 12), 54)
    assert one.prompt == " numbers: 3 7 8 12 target: 54"
    assert one.id == "small-3-7-8-12-54"


def test_moves_are_exact_and_in_order() -> None:
    assert [str(move.step) for move in moves((2, 4))] == ["4 + 2 = 6", "4 - 2 = 2", "4 * 2 = 8", "4 / 2 = 2"]
    assert [str(move.step) for move in moves((5, 5))] == ["5 + 5 = 10", "5 * 5 = 25", "5 / 5 = 1"]
    assert len(moves((5, 5, 5, 5))) == 3  # equal steps count once
