r"""The spawn/join language of Adaptive Parallel Reasoning (Pan et al. 2025, arXiv:2504.15466), in few words.

One parent, one level of children. The parent's text, with what the runtime forces in angle brackets::

     numbers: 3 7 8 12 target: 54
    < children: free>
     spawn: 7 + 3 = 10 left: 8 10 12
     spawn: 8 + 3 = 11 left: 7 11 12
     join:
    < none>
    < 8 + 3 = 11 , 12 - 7 = 5 , ...>
     answer: 8 + 3 = 11 , 12 - 7 = 5 , ...

A child is a sequence of its own: `` step: 7 + 3 = 10 left: 8 10 12 target: 54``, a search, and ``answer: STEPS``
or ``answer: none``. Its answer, and nothing else of it, goes back to the parent (recompute join). A parent may open
further rounds after a join. Differences from the original: the child prompt holds one step in place of a node
path, and the header conditions on the children of a round where APR's "Sub Call Budget" states their mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from orchestra.protocols.base import Branch, Fork, Problem, Protocol, Reader
from orchestra.protocols.lexer import Place

CHILDREN = "children:"
SPAWN = "spawn:"
JOIN = "join:"
ANSWER = "answer:"
NONE = "none"
FREE = "free"

HEADER = CHILDREN
STOP = JOIN
"""A stop string: the parent's turn ends when it has written this."""

MAX_CHILDREN = 64
"""At most so many spawn lines of one turn are read."""

_STEP = r"\d{1,4} [-+*/] \d{1,4} = \d{1,4}"
_SPAWN = re.compile(rf"spawn: ({_STEP} left:(?: \d{{1,4}}){{1,8}})")
_ANSWER = re.compile(rf"({_STEP}(?: , {_STEP}){{0,7}})")
_TARGET = re.compile(r"target:\s{0,8}(\d{1,9})")


def header(children: int | None = None) -> str:
    r"""The forced line after the prompt: at most `children` per spawn round, or as many as the model likes.

    Raises:
        ValueError: `children` is less than one.
    """
    if children is not None and children < 1:
        raise ValueError(f"children must be at least 1, got {children}")
    return f"\n {CHILDREN} {FREE if children is None else children}\n"


def parse_spawn(turn: str) -> list[str]:
    """The children that a parent's turn asks for, in order, such as ``"7 + 3 = 10 left: 8 10 12"``.

    Lines that are not well-formed are skipped; of more than `MAX_CHILDREN` lines the first ones are read. Text after
    a join tag does not belong to the turn.
    """
    found: list[str] = []
    for line in turn.partition(JOIN)[0].splitlines():
        match = _SPAWN.fullmatch(" ".join(line.split()))
        if match is not None:
            found.append(match.group(1))
            if len(found) == MAX_CHILDREN:
                break
    return found


def child_prompt(spawn: str, parent: str) -> str:
    """What a child is given: its spawn line and the target, which stands first in the parent's text."""
    match = _TARGET.search(parent)
    target = f" target: {match.group(1)}" if match is not None else ""
    return f" step: {' '.join(spawn.split())}{target}"


def child_result(child: str) -> str | None:
    """The steps of a child's answer, or None when it gave up, was cut off or wrote something else."""
    _, tag, answer = child.rpartition(ANSWER)
    match = _ANSWER.fullmatch(" ".join(answer.split())) if tag else None
    return None if match is None else match.group(1)


def render_join(results: Iterable[str | None]) -> str:
    """The forced text after a join tag: one line for each child of the round, in the order of their spawn lines."""
    return "\n" + "".join(f" {NONE if result is None else ' '.join(result.split())}\n" for result in results)


@dataclass
class Round:
    """One spawn round.

    Attributes:
        spawned: the children asked for, as `parse_spawn` has them.
        results: what they handed back, in order; None for a child without an answer.
    """

    spawned: list[str]
    results: list[str | None] = field(default_factory=list)


@dataclass
class Search:
    """A parent's text: plain text, and its spawn rounds where they stand."""

    parts: list[str | Round] = field(default_factory=list)


class AprProtocol(Protocol[Search]):
    """See the module."""

    name = "apr"
    paper = "Pan et al. 2025, arXiv 2504.15466"

    @property
    def tags(self) -> tuple[str, ...]:
        """See `Protocol.tags`."""
        return (CHILDREN, SPAWN, JOIN, ANSWER)

    def reader(self) -> AprReader:
        """See `Protocol.reader`."""
        return AprReader()

    def render(self, document: Search) -> str:
        """See `Protocol.render`."""
        out = ""
        for part in document.parts:
            if isinstance(part, str):
                out += part
            else:
                out += "".join(f" {SPAWN} {line}\n" for line in part.spawned) + f" {JOIN}" + render_join(part.results)
        return out


class AprReader(Reader[Search]):
    """See `Reader`. A turn ends with its join tag; the lines after it are the results that the runtime forced."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.document = Search()
        self._pending = ""
        self._line = 1
        self._round: Round | None = None  # waiting for its results

    def feed(self, text: str) -> Fork | None:
        """See `Reader.feed`."""
        self._pending += text
        fork: Fork | None = None
        while True:
            if self._round is not None and not self._results(self._round):
                return fork
            if JOIN not in self._pending:
                return fork
            turn, _, self._pending = self._pending.partition(JOIN)
            spawned = self._turn(turn)
            if spawned:
                self._round = Round(spawned)
                self.document.parts.append(self._round)
                fork = Fork(tuple(Branch(str(i), line) for i, line in enumerate(spawned, 1)))

    def close(self) -> Search:
        """See `Reader.close`."""
        if self._round is not None:
            self._complain(f"{len(self._round.spawned) - len(self._round.results)} children have handed nothing back")
        self._write(self._pending)
        self._pending = ""
        return self.document

    def _turn(self, turn: str) -> list[str]:
        """The children of a turn; what stands before their lines is plain text."""
        spawned = parse_spawn(turn)
        lines = turn.splitlines(keepends=True)
        told = [line for line in lines if line.strip().startswith(SPAWN)]
        plain = [line for line in lines if not line.strip().startswith(SPAWN)] if spawned else [*lines, JOIN]
        for line in told:
            if not parse_spawn(line):
                self._complain(f"not a child: {line.strip():.60}", lines.index(line))
        if not spawned:
            self._complain("a join without children", len(lines) - 1)
        if len(told) > MAX_CHILDREN:
            self._complain(f"{len(told)} children, of which {MAX_CHILDREN} are read")
        text = "".join(plain).rstrip(" ") if spawned else "".join(plain)  # the join tag is rendered with its space
        if text.strip():
            self._write(text)
        self._line += turn.count("\n")
        return spawned

    def _results(self, waiting: Round) -> bool:
        """Read the lines that were handed back; whether all are there."""
        while len(waiting.results) < len(waiting.spawned):
            line, newline, rest = self._pending.partition("\n")
            if not newline:
                return False
            self._pending, self._line = rest, self._line + 1
            said = " ".join(line.split())
            if said:
                waiting.results.append(None if said == NONE else said)
        self._round = None
        return True

    def _write(self, text: str) -> None:
        parts = self.document.parts
        if text and parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)

    def _complain(self, message: str, below: int = 0) -> None:
        self.problems.append(Problem(Place(self._line + max(below, 0), 1), message))


APR = AprProtocol()
