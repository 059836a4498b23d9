r"""Sums of products as demonstrations of map and reduce: a path for each product, a conclusion that adds them up.

For models that know digits and words. A demonstration, its steps broken at the line ends here::

    Compute 17 * 24 + 38 * 6.
    <Parallel><Goal><Outline>1: 17 * 24</Outline><Outline>2: 38 * 6</Outline></Goal>
    <Path>1: 17 * 24 = 17 * 20 + 17 * 4 = 340 + 68 = 408</Path>
    <Path>2: 38 * 6 = 228</Path>
    <Conclusion> 1: 408 , 2: 228 , 408 + 228 = 636</Conclusion></Parallel>
    The answer is \boxed{636}.

Each result carries its path's label, and the conclusion names the results by it: paths that are joined by reuse stand
at the same positions.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from orchestra.protocols import MULTIVERSE, THREAD_WEAVER
from orchestra.protocols.base import Branch
from orchestra.protocols.document import Block, Document, Path

LANGUAGES = {"map_reduce": MULTIVERSE, "threads": THREAD_WEAVER}
TERMS, FACTORS = (2, 6), (2, 99)
"""Fewest and most products of a sum, and the smallest and largest factor."""


class Chain(NamedTuple):
    """A demonstration: prompt, the text after it, and the value that it comes to."""

    prompt: str
    text: str
    answer: int


def chain(rng: random.Random, language: str = "map_reduce") -> Chain:
    """A random sum of products, worked out in parallel; `language` is a key of `LANGUAGES`."""
    pairs = [(rng.randint(*FACTORS), rng.randint(*FACTORS)) for _ in range(rng.randint(*TERMS))]
    values = [a * b for a, b in pairs]
    terms = [f"{a} * {b}" for a, b in pairs]
    labels = [str(i) for i in range(1, len(pairs) + 1)]
    block = Block(
        outlines=[Branch(label, term) for label, term in zip(labels, terms, strict=True)],
        paths=[Path(label, [f" {_product(a, b)}"]) for label, (a, b) in zip(labels, pairs, strict=True)],
    )
    results = [f"{label}: {value}" for label, value in zip(labels, values, strict=True)]
    reduced = " " + " , ".join([*results, *_additions(values)])
    answer = f"\nThe answer is \\boxed{{{sum(values)}}}."
    rules = LANGUAGES[language]
    if rules.conclusion:
        block.conclusion = reduced
    else:
        answer = f"\n{reduced.strip()}{answer}"
    text = rules.render(Document(["\n", block, answer]))
    return Chain(f"Compute {' + '.join(terms)}.", text, sum(values))


def _product(a: int, b: int) -> str:
    """A product by the tens and ones of its second factor."""
    tens, ones = b - b % 10, b % 10
    if not tens or not ones:
        return f"{a} * {b} = {a * b}"
    return f"{a} * {b} = {a} * {tens} + {a} * {ones} = {a * tens} + {a * ones} = {a * b}"


def _additions(values: Sequence[int]) -> list[str]:
    sums = list(accumulate(values))
    return [f"{before} + {after - before} = {after}" for before, after in pairwise(sums)]
