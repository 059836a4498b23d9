"""Countdown: reach the target by combining all the numbers, each used exactly once.

Two levels share one rule set (every intermediate value lies in 1..99, division is exact):

* ``small``: numbers from 1..15, one to four first steps lead to a solution.
* ``hard``: numbers from 1..50 (at least one above 15, so a model can tell the levels apart).

Instances belong to ``train``, ``dev`` or ``test`` by a hash of (sorted numbers, target), so the splits are
disjoint whatever the order or seed in which they are drawn. The exact checker is in `countdown_check`.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

Split = Literal["train", "dev", "test"]

OPERATORS = ("+", "-", "*", "/")
SMALLEST, LARGEST = 1, 99
"""Bounds of every intermediate value."""


class Step(NamedTuple):
    """One operation on two of the numbers at hand; the larger operand comes first."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left} {self.operator} {self.right} = {self.result}"


class Move(NamedTuple):
    """A step and the sorted numbers that are left after it."""

    step: Step
    left: tuple[int, ...]


@dataclass(frozen=True)
class Level:
    """What instances a level holds.

    Attributes:
        name: Name of the level.
        largest: Numbers are drawn from 1..largest.
        above: At least one number is greater than this.
        openings: Fewest and most first steps from which the target can be reached.
        targets: Smallest and largest target.
        count: How many numbers an instance has.
    """

    name: str
    largest: int
    above: int
    openings: tuple[int, int]
    targets: tuple[int, int] = (10, 99)
    count: int = 4


LEVELS = {
    "small": Level("small", largest=15, above=0, openings=(1, 4)),
    "hard": Level("hard", largest=50, above=15, openings=(1, 4)),
}


@dataclass(frozen=True, order=True)
class Instance:
    """One problem. `numbers` are sorted."""

    numbers: tuple[int, ...]
    target: int
    level: str = "small"

    @property
    def id(self) -> str:
        """A name that is the same on every machine, such as ``small-3-7-8-12-54``."""
        return "-".join([self.level, *map(str, self.numbers), str(self.target)])

    @property
    def prompt(self) -> str:
        """The problem in the words of the embedded model."""
        return prompt(self.numbers, self.target)

    @property
    def split(self) -> Split:
        """The split that this instance belongs to."""
        return split_of(self.numbers, self.target)


def prompt(numbers: Iterable[int], target: int) -> str:
    """The problem in the words of the embedded model: `` numbers: 3 7 8 12 target: 54``."""
    return f" numbers: {' '.join(map(str, numbers))} target: {target}"


def split_of(numbers: Iterable[int], target: int) -> Split:
    """The split of a problem, by a hash of its sorted numbers and target: 90 % train, 5 % dev, 5 % test."""
    key = f"{' '.join(map(str, sorted(numbers)))}={target}"
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100
    return "train" if bucket < 90 else "dev" if bucket < 95 else "test"


def apply(operator: str, left: int, right: int) -> int | None:
    """The result of one operation, or None where it is not exact or leaves 1..99."""
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif right == 0 or left % right:
        return None
    else:
        value = left // right
    return value if SMALLEST <= value <= LARGEST else None


@lru_cache(maxsize=20_000)
def moves(numbers: tuple[int, ...]) -> tuple[Move, ...]:
    """All distinct steps from sorted `numbers`, pairs from the smallest up, operators in the order ``+ - * /``."""
    found: dict[Step, Move] = {}
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            high, low = numbers[j], numbers[i]
            for operator in OPERATORS:
                value = apply(operator, high, low)
                if value is not None:
                    step = Step(high, operator, low, value)
                    found.setdefault(step, Move(step, tuple(sorted((*rest, value)))))
    return tuple(found.values())


@lru_cache(maxsize=250_000)
def _reach(numbers: tuple[int, ...]) -> int:
    # A set of values as bits: this is asked for every possible remainder, and sets would take gigabytes.
    if len(numbers) == 1:
        return 1 << numbers[0]
    found = 0
    for j in range(1, len(numbers)):
        for i in range(j):
            rest = numbers[:i] + numbers[i + 1 : j] + numbers[j + 1 :]
            for operator in OPERATORS:
                value = apply(operator, numbers[j], numbers[i])
                if value is not None:
                    found |= _reach(tuple(sorted((*rest, value)))) if rest else 1 << value
    return found


def can_reach(numbers: tuple[int, ...], target: int) -> bool:
    """Whether sorted `numbers` can be combined to `target` under the rules."""
    return bool(_reach(numbers) >> target & 1)


def reachable(numbers: tuple[int, ...]) -> list[int]:
    """All values that sorted `numbers` can be combined to under the rules, ascending."""
    return [value for value in range(SMALLEST, LARGEST + 1) if can_reach(numbers, value)]


def solve(numbers: Sequence[int], target: int) -> tuple[Step, ...] | None:
    """The first solution in the order of `moves`, or None. This is the symbolic serial search."""
    ordered = tuple(sorted(numbers))
    if len(ordered) == 1:
        return () if ordered[0] == target else None
    for move in moves(ordered):
        if can_reach(move.left, target):
            rest = solve(move.left, target)
            return None if rest is None else (move.step, *rest)
    return None


def openings(numbers: Sequence[int], target: int) -> list[Move]:
    """The first steps after which `target` can still be reached."""
    return [move for move in moves(tuple(sorted(numbers))) if can_reach(move.left, target)]


def stream(level: str, split: Split, rng: random.Random, *, solvable: bool = True) -> Iterator[Instance]:
    """Endless random instances of one level and split, repeats included.

    Args:
        level: A key of `LEVELS`.
        split: Which split.
        rng: The only source of randomness.
        solvable: False gives problems without any solution instead (demonstrations of giving up).
    """
    rule = LEVELS[level]
    fewest, most = rule.openings if solvable else (0, 0)
    while True:
        numbers = tuple(sorted(rng.randint(1, rule.largest) for _ in range(rule.count)))
        target = rng.randint(*rule.targets)
        if numbers[-1] <= rule.above or split_of(numbers, target) != split:
            continue
        if fewest <= len(openings(numbers, target)) <= most:
            yield Instance(numbers, target, level)


def generate(level: str, split: Split, count: int, seed: int = 0) -> list[Instance]:
    """`count` distinct instances, the same on every machine.

    Raises:
        ValueError: The level or split is unknown, or it does not hold that many instances.
    """
    if level not in LEVELS:
        raise ValueError(f"unknown Countdown level {level!r}: choose from {', '.join(LEVELS)}")
    if split not in ("train", "dev", "test"):
        raise ValueError(f"unknown split {split!r}: choose from train, dev, test")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    rule = LEVELS[level]
    most = math.comb(rule.largest + rule.count - 1, rule.count) * (rule.targets[1] - rule.targets[0] + 1)
    if count > most:
        raise ValueError(f"level {level!r} has too few {split} instances for {count}: below {most}")
    found: dict[Instance, None] = {}
    repeats = 0
    if count:
        for instance in stream(level, split, random.Random(f"countdown/{level}/{split}/{seed}")):
            repeats = repeats + 1 if instance in found else 0
            found.setdefault(instance)
            if len(found) == count:
                break
            if repeats > 1000:
                raise ValueError(f"level {level!r} has too few {split} instances: found {len(found)} of {count}")
    return list(found)


def guess(instance: Instance, rng: random.Random) -> bool:
    """Whether a uniformly random valid sequence of steps solves the instance (the floor for any model)."""
    numbers = instance.numbers
    while len(numbers) > 1:
        choices = moves(numbers)
        if not choices:
            return False
        numbers = rng.choice(choices).left
    return numbers[0] == instance.target
