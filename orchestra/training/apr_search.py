"""The symbolic solvers of Adaptive Parallel Reasoning (arXiv:2504.15466) on its own task, in its own text.

Four numbers from 1..99, a target from 10..100, all numbers to be used once. *SoS+* searches in one sequence; *APR*'s
parent spawns the children of a node as sub-searches and reads what they found. Both expand a node to its best few
successors, by how near their numbers are to factors of the target, and visit nodes best first.

Restated from the published text and parameters. One contradiction is settled as the published data have it: a parent
spawns with probability 0.9 (the paper says 0.1).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import NamedTuple

from orchestra.protocols.apr_published import CALLING, END_CALLING, REACHED, render_join

NUMBERS, LARGEST, TARGETS = 4, 99, (10, 100)
"""How many numbers a problem has, the largest of them, and the smallest and largest target."""
SERIAL_BEAM, PARENT_BEAM, CHILD_BEAM = (1, 5), (1, 10), 15
"""Fewest and most successors that SoS+ and an APR parent keep of a node, and the most that a child keeps."""
DESCEND, SPAWN = 0.5, 0.9
"""How probably SoS+ searches a node's successors at once, and an APR parent spawns them."""

_EXPLORED = re.compile(r"Exploring Operation: (\d+)([-+*/])(\d+)=(\d+), Resulting Numbers: \[([\d, ]+)\]")
_STATE = re.compile(r"Current State: (\d+):\[([\d, ]+)\]")


class Problem(NamedTuple):
    """Numbers in the order of the prompt, and what they are to make."""

    numbers: tuple[int, ...]
    target: int


@dataclass(frozen=True)
class Node:
    """A state of the search.

    Attributes:
        id: such as `0,2`: the third successor of the root.
        numbers: what is at hand, in order.
        operations: how it was reached from the problem's numbers.
        parent: the node that it is a successor of.
    """

    id: str
    numbers: tuple[int, ...]
    operations: tuple[str, ...] = ()
    parent: Node | None = None

    def line(self, target: int) -> str:
        """Its state, as text."""
        shown = ", ".join(map(repr, self.operations))
        return f"Current State: {target}:{list(self.numbers)}, Operations: [{shown}]"


class Call(NamedTuple):
    """One call of the model: what it is given and what it writes."""

    prompt: str
    completion: str


@dataclass
class Trace:
    """What a solver wrote.

    Attributes:
        problem: which.
        main: SoS+: one call; APR: the parent's, each of which goes on from what was joined after the one before.
        children: the sub-searches of each spawn round.
        solved: whether it has found a solution.
    """

    problem: Problem
    main: list[Call] = field(default_factory=list)
    children: list[list[Call]] = field(default_factory=list)
    solved: bool = False

    @property
    def calls(self) -> list[Call]:
        """All calls, each a training sequence of its own."""
        return [*self.main, *(call for group in self.children for call in group)]


# -- the task ----------------------------------------------------------------------------------------------------------


def successors(numbers: Sequence[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every operation on two of the numbers, and the numbers after it: the others in order, then the result."""
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            rest = (*numbers[:i], *numbers[i + 1 : j], *numbers[j + 1 :])
            low, high = sorted((numbers[i], numbers[j]))
            yield f"{numbers[i]}+{numbers[j]}={low + high}", (*rest, low + high)
            yield f"{numbers[i]}*{numbers[j]}={low * high}", (*rest, low * high)
            yield f"{high}-{low}={high - low}", (*rest, high - low)
            if low and high % low == 0:
                yield f"{high}/{low}={high // low}", (*rest, high // low)


@lru_cache(maxsize=50_000)
def _solvable(numbers: tuple[int, ...], target: int) -> bool:
    if len(numbers) == 1:
        return numbers[0] == target
    return any(_solvable(tuple(sorted(left)), target) for _, left in successors(numbers))


def problems(rng: random.Random) -> Iterator[Problem]:
    """Endless problems that have a solution."""
    while True:
        numbers = tuple(rng.randint(1, LARGEST) for _ in range(NUMBERS))
        target = rng.randint(*TARGETS)
        if _solvable(tuple(sorted(numbers)), target):
            yield Problem(numbers, target)


@cache
def _factors(target: int) -> tuple[int, ...]:
    return tuple(factor for factor in range(2, target + 1) if target % factor == 0)


def distance(numbers: Sequence[int], target: int) -> int:
    """The heuristic: how far each number is from the nearest factor of the target (1 is none), in all."""
    return sum(min(abs(number - factor) for factor in _factors(target)) for number in numbers)


def check_solution(prompt: str, text: str) -> bool:
    """Whether a text solves the problem in `prompt`, with the semantics of the published checker.

    Its `Exploring Operation` lines up to the first `Goal Reached` must use numbers that are at hand, be right, and say
    what is at hand after them; then nothing but the target may be left.
    """
    given = _STATE.search(prompt)
    if given is None:
        return False
    target, at_hand = int(given[1]), Counter(map(int, given[2].split(",")))
    for line in text.splitlines():
        if REACHED in line:
            return at_hand == Counter([target])
        if (found := _EXPLORED.search(line)) is None:
            continue
        left, right, result = int(found[1]), int(found[3]), int(found[4])
        used = Counter([left, right])
        right_result = {
            "+": left + right == result,
            "-": left - right == result,
            "*": left * right == result,
            "/": right != 0 and right * result == left,
        }[found[2]]
        after = at_hand - used + Counter([result])
        if used - at_hand or not right_result or after != Counter(map(int, found[5].split(","))):
            return False
        at_hand = after
    return False


# -- the searches ------------------------------------------------------------------------------------------------------


def serial(problem: Problem, rng: random.Random, beam: int | None = None) -> Trace:
    """SoS+: everything in one sequence.

    Args:
        problem: what to solve.
        rng: of the beam, of the order of successors and of descents.
        beam: successors kept of a node; None: at random, see `SERIAL_BEAM`.
    """
    search = _Search(problem, rng, beam or rng.randint(*SERIAL_BEAM))
    found = search.run(search.root, level=0, given=True)
    search.end(found, search.root)
    return Trace(problem, [Call(serial_prompt(problem), "\n" + search.text)], [], found is not None)


def apr(problem: Problem, rng: random.Random, beams: tuple[int, int] | None = None) -> Trace:
    """APR: a parent, and the children that it spawns, one level deep.

    Args:
        problem: what to solve.
        rng: of the beams, of the order of successors and of spawns.
        beams: successors kept of a node by the parent and by children; None: at random, see `PARENT_BEAM`.
    """
    if beams is None:
        own = rng.randint(*PARENT_BEAM)
        beams = own, rng.randint(own, CHILD_BEAM)
    trace = Trace(problem)
    search = _Search(problem, rng, beams[0], beams[1], trace)
    found = search.run(search.root, level=0, given=True)
    search.end(found, search.root)
    trace.main.append(Call(parent_prompt(problem), "\n" + search.text))
    trace.solved = found is not None
    return trace


def serial_prompt(problem: Problem) -> str:
    """What SoS+ is given."""
    return Node("0", problem.numbers).line(problem.target)


def parent_prompt(problem: Problem) -> str:
    """What an APR parent is given."""
    return _moving(Node("0", problem.numbers), problem.target)


def _moving(node: Node, target: int) -> str:
    return f"Moving to Node #{node.id}\n{node.line(target)}"


class _Search:
    """One sequence that is being written. With a trace it is an APR parent's, else it never spawns."""

    def __init__(
        self, problem: Problem, rng: random.Random, beam: int, child_beam: int = 0, trace: Trace | None = None
    ) -> None:
        self.problem, self.rng, self.beam, self.child_beam, self.trace = problem, rng, beam, child_beam, trace
        self.root = Node("0", problem.numbers)
        self.descends = trace is None and not child_beam
        self.text = ""

    def write(self, line: str) -> None:
        self.text += line + "\n"

    def run(self, start: Node, level: int, *, given: bool = False) -> Node | None:
        """Search from a node.

        Args:
            start: where.
            level: how deep in sub-searches.
            given: the start has been told already.

        Returns:
            A node with nothing but the target in it, if there is one.
        """
        queue = [start]
        while queue:
            batch, queue = queue[: self.beam], queue[self.beam :]
            for node in batch:
                if not (given and node is start):
                    self.write(_moving(node, self.problem.target))
                children, goal = self._expand(node)
                if goal is not None:
                    return goal
                if self.trace is not None and len(children) > 1 and self.rng.random() < SPAWN:
                    if (goal := self._spawn(children)) is not None:
                        return goal
                elif self.descends and children and self.rng.random() < DESCEND:
                    for child in children:
                        self.text += f"Start Sub Search at level {level + 1}: "
                        if (goal := self.run(child, level + 1)) is not None:
                            return goal
                        self.write(f"Exit Sub Search at level {level + 1}")
                else:
                    queue = self._sorted([*queue, *children])
        return None

    def _sorted(self, nodes: Sequence[Node]) -> list[Node]:
        return sorted(nodes, key=lambda node: distance(node.numbers, self.problem.target))

    def _expand(self, node: Node) -> tuple[list[Node], Node | None]:
        """Write a node's best successors. Returns those to go on from, best first, or the one that is the goal."""
        target = self.problem.target
        best = sorted(successors(node.numbers), key=lambda found: distance(found[1], target))[: self.beam]
        self.rng.shuffle(best)
        children: list[Node] = []
        for operation, numbers in best:
            child = Node(f"{node.id},{len(children)}", numbers, (*node.operations, operation), node)
            self.write(f"Exploring Operation: {operation}, Resulting Numbers: {list(numbers)}")
            if len(numbers) > 1:
                children.append(child)
                self.write(f"Generated Node #{child.id}: {target}:{list(numbers)} Operation: {operation}")
            elif numbers[0] == target:
                self.write(f"{target},{target} equal: {REACHED}")
                return [], child
            else:
                self.write(f"{numbers[0]},{target} unequal: No Solution")
        return self._sorted(children), None

    def _spawn(self, children: Sequence[Node]) -> Node | None:
        """Have children searched by sub-searches, and write down what they found."""
        assert self.trace is not None
        asked = "".join(
            f"<Start Sub Search {i} at level 1> Moving to Node #{node.id}\n" for i, node in enumerate(children)
        )
        prompt, before = parent_prompt(self.problem), self.text
        self.trace.main.append(Call(prompt, f"\n{before}{CALLING}\n{asked}{END_CALLING}"))
        calls, first = [], None
        for node in children:
            search = _Search(self.problem, self.rng, self.child_beam, self.child_beam)
            found = search.run(node, level=1, given=True)
            search.end(found, node)
            calls.append(Call(_moving(node, self.problem.target), "\n" + search.text))
            first = first or found
        self.text += render_join([node.id for node in children], [call.completion for call in calls])
        self.trace.children.append(calls)
        if first is not None:
            self.write(f"{self.problem.target},{self.problem.target} equal: {REACHED}")
        return first

    def end(self, goal: Node | None, start: Node) -> None:
        """Restate the path from `start` to the goal, or give up."""
        if goal is None:
            self.write("No solution found.")
            return
        path = [goal]
        while path[-1].id != start.id:
            parent = path[-1].parent
            assert parent is not None  # the goal comes after the start
            path.append(parent)
        target = self.problem.target
        for node, after in zip(path[:0:-1], path[-2::-1], strict=True):
            self.write(_moving(node, target))
            operation = after.operations[-1]
            self.write(f"Exploring Operation: {operation}, Resulting Numbers: {list(after.numbers)}")
            if len(after.numbers) > 1:
                self.write(f"Generated Node #{after.id}: {target}:{list(after.numbers)} Operation: {operation}")
        self.write(f"{target},{target} equal: {REACHED}")
