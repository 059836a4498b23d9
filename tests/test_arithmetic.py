"""Sums of products: the conclusion is right, and every step on the way."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.answers import extract_answer
from orchestra.protocols import PROTOCOLS
from orchestra.training.arithmetic import LANGUAGES, chain


@pytest.mark.parametrize("behaviour", LANGUAGES)
@given(st.integers(0, 10_000))
def test_every_equation_holds_and_the_conclusion_is_the_sum(behaviour: str, seed: int) -> None:
    made = chain(random.Random(seed), behaviour)
    asked = made.prompt.removeprefix("Compute ").removesuffix(".")
    value = sum(int(a) * int(b) for a, b in (term.split(" * ") for term in asked.split(" + ")))
    assert made.answer == value
    assert extract_answer(made.text) == str(value)
    protocol = PROTOCOLS[LANGUAGES[behaviour].name]
    assert not protocol.validate(made.text)
    for equation in re.findall(r"\d[\d +*=]*=[\d +*=]*\d", re.sub(r"\d+:", ";", made.text)):
        sides = {sum(_product(term) for term in side.split("+")) for side in equation.split("=")}
        assert len(sides) == 1, equation


def _product(term: str) -> int:
    value = 1
    for factor in term.split("*"):
        value *= int(factor)
    return value


def test_results_carry_the_labels_of_their_paths() -> None:
    made = chain(random.Random(5))
    (block,) = PROTOCOLS["multiverse"].parse(made.text).blocks
    for path in block.paths:
        result = str(path.parts[0]).rpartition("= ")[2]
        assert f"{path.label}: {result} " in f"{block.conclusion} "
