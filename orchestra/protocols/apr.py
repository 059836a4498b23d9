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
