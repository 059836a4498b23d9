"""Symbolic demonstrators of Countdown: serial search, and the parent and children of spawn/join.

Both behaviours try first steps in the order of `countdown.moves` and search the three numbers left line by line. On
the small level the search is complete; on the hard level it looks at a random subset of the first steps (as APR's beam
prunes) and then gives up. So other samples look elsewhere, and voting, racing and RL have something to gain. The subset
keeps the order: a small model does not learn to draw without replacement from its own distant text.

A search line is `` 10 + 8 = 18 18 12 30 6 x x 54 miss``: a step on three numbers, the two numbers left, the four
results of the last step (x: outside the rules), the target, and whether it is among the results. The target
stands right before the mark because that is what made small models notice their hits.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from orchestra.evaluation.countdown import OPERATORS, Instance, Move, Step, apply, can_reach, moves, prompt
from orchestra.protocols import apr

PRUNED = (3, 8)
"""Fewest and most first steps that a demonstration of the hard level looks at."""
SHUFFLED = 0.15
"""Share of problems whose numbers are shown in random order (instances are sorted, users' prompts are not)."""


class Segment(NamedTuple):
    """A stretch of a demonstration; only what the model must learn to write has `learn` set."""

    text: str
    learn: bool


@dataclass(frozen=True)
class Demonstration:
    """One training sequence: begin token, segments, end token.

    Attributes:
        kind: ``serial``, ``parent``, ``child`` or ``three`` (a problem of three numbers).
        segments: What the model is given and what it must write.
        solved: Whether it ends in a solution.
    """

    kind: str
    segments: tuple[Segment, ...]
    solved: bool

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(segment.text for segment in self.segments)


@lru_cache(maxsize=50_000)
def _lines(numbers: tuple[int, ...]) -> tuple[tuple[str, Move, tuple[int | None, ...]], ...]:
    """Every search line of three numbers up to its target, with what it stands for."""
    lines = []
    for move in moves(numbers):
        low, high = move.left
        results = tuple(apply(operator, high, low) for operator in OPERATORS)
        shown = " ".join("x" if value is None else str(value) for value in results)
        lines.append((f" {move.step} {high} {low} {shown}", move, results))
    return tuple(lines)


def search(numbers: Sequence[int], target: int) -> tuple[str, tuple[Step, ...] | None]:
    """The search lines of three numbers up to the first hit, and the two steps found (None without a hit)."""
    text = []
    for line, move, results in _lines(tuple(sorted(numbers))):
        hit = target in results
        text.append(f"{line} {target} {'hit' if hit else 'miss'}\n")
        if hit:
            low, high = move.left
            last = Step(high, OPERATORS[results.index(target)], low, target)
            return "".join(text), (move.step, last)
    return "".join(text), None


def first_moves(instance: Instance, rng: random.Random, count: int | None = None) -> list[Move]:
    """The first steps that a demonstration looks at, in order; `count` fixes how many on the hard level."""
    every = list(moves(instance.numbers))
    if instance.level == "small":
        return every
    size = min(len(every), count or rng.randint(*PRUNED))
    return [every[place] for place in sorted(rng.sample(range(len(every)), size))]


def steps_text(steps: Iterable[Step]) -> str:
    """Steps as an answer writes them."""
    return " , ".join(map(str, steps))


def serial(instance: Instance, rng: random.Random) -> Demonstration:
    """One sequence that tries first step after first step until a hit."""
    text, steps = ["\n"], None
    for move in first_moves(instance, rng):
        text.append(f" step: {outline(move)}\n")
        lines, rest = search(move.left, instance.target)
        text.append(lines)
        if rest is not None:
            steps = (move.step, *rest)
            break
    return _demonstration("serial", shown_as(instance, rng), "".join(text), steps)


def three(numbers: Sequence[int], target: int) -> Demonstration:
    """A problem of three numbers: short, and rich in hits."""
    text, steps = search(numbers, target)
    return _demonstration("three", prompt(numbers, target), "\n" + text, steps)


def child(move: Move, target: int) -> Demonstration:
    """A child: the search of the three numbers left after its first step."""
    text, rest = search(move.left, target)
    steps = None if rest is None else (move.step, *rest)
    return _demonstration("child", f" step: {outline(move)} target: {target}", "\n" + text, steps)


def spawn_join(
    instance: Instance, rng: random.Random, children: int | None = None
) -> tuple[Demonstration, list[Demonstration]]:
    """A parent and all its children.

    Args:
        instance: The problem.
        rng: Chooses first steps on the hard level.
        children: None: as the model likes, all in one round. Else rounds of at most so many: on the small level until
            one succeeds or the steps run out, on the hard level one round (its search is pruned).
    """
    order = first_moves(instance, rng, children)
    size = children or max(1, len(order))
    segments = [Segment(shown_as(instance, rng) + apr.header(children), learn=False)]
    offspring: list[Demonstration] = []
    steps: tuple[Step, ...] | None = None
    for start in range(0, len(order), size):
        group = order[start : start + size]
        turn = "".join(f" {apr.SPAWN} {outline(move)}\n" for move in group)
        segments.append(Segment(f"{turn} {apr.JOIN}", learn=True))
        results: list[str | None] = []
        for move in group:
            offspring.append(child(move, instance.target))
            rest = search(move.left, instance.target)[1]
            results.append(None if rest is None else steps_text((move.step, *rest)))
            if rest is not None and steps is None:
                steps = (move.step, *rest)
        segments.append(Segment(apr.render_join(results), learn=False))
        if steps is not None:
            break
    segments.append(Segment(_answer(steps), learn=True))
    return Demonstration("parent", tuple(segments), steps is not None), offspring


def balanced_children(instance: Instance, rng: random.Random) -> list[Demonstration]:
    """One child that finds the target and one that does not, where there are such: hits must not be rare."""
    chosen = []
    for wanted in (True, False):
        group = [move for move in moves(instance.numbers) if can_reach(move.left, instance.target) is wanted]
        if group:
            chosen.append(child(rng.choice(group), instance.target))
    return chosen


def shown_as(instance: Instance, rng: random.Random) -> str:
    """The prompt of an instance, now and then with its numbers in another order."""
    numbers = list(instance.numbers)
    if rng.random() < SHUFFLED:
        rng.shuffle(numbers)
    return prompt(numbers, instance.target)


def outline(move: Move) -> str:
    """A first step and the numbers that it leaves."""
    return f"{move.step} left: {' '.join(map(str, move.left))}"


def _answer(steps: tuple[Step, ...] | None) -> str:
    return f" {apr.ANSWER} {apr.NONE if steps is None else steps_text(steps)}"


def _demonstration(kind: str, given: str, search_text: str, steps: tuple[Step, ...] | None) -> Demonstration:
    learned = Segment(search_text + _answer(steps), learn=True)
    return Demonstration(kind, (Segment(given, learn=False), learned), steps is not None)
