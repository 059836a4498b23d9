"""The spawn/join text that Adaptive Parallel Reasoning published (arXiv:2504.15466), for Countdown.

A parent writes its search, and after it, in a block of its own, which nodes are to be searched by children::

    Generated Node #0,1: 54:[7, 12, 11] Operation: 3+8=11
    <Calling Sub Searches>
    <Start Sub Search 0 at level 1> Moving to Node #0,1
    <End Calling Sub Searches>

The block is taken away, and what the children found stands in its place::

    <Sub Searches>
    <No Solution in Sub Search 0 at level 1 at Node #0,1>
    <End Sub Searches>

A child is given its node's state, which the runtime reads from the parent's text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

REACHED = "Goal Reached"
CALLING, END_CALLING = "<Calling Sub Searches>", "<End Calling Sub Searches>"
JOINED, END_JOINED = "<Sub Searches>", "<End Sub Searches>"
MOST_CHILDREN = 64
"""At most so many children of one block are run."""

_STATE = re.compile(r"Current State: (\d{1,9}):\[([\d, ]{1,200})\]")
_NODE = re.compile(r"Generated Node #(\d{1,4}(?:,\d{1,4}){1,8}): \d{1,9}:\[([\d, ]{1,200})\] Operation: (\S{1,40})")
_START = re.compile(r"<Start Sub Search \d{1,4} at level 1> Moving to Node #(\d{1,4}(?:,\d{1,4}){1,8})")


class State(NamedTuple):
    """What a parent has told of a node: the numbers as text, and the operations from the root to it."""

    numbers: str
    operations: tuple[str, ...]


def states(text: str) -> dict[str, State]:
    """The nodes that a parent's text has generated, by id."""
    found = {"0": State("", ())}
    for node, numbers, operation in _NODE.findall(text):
        before = found.get(node.rpartition(",")[0])
        if before is not None:
            found[node] = State(numbers, (*before.operations, operation))
    return found


def asked(block: str, text: str) -> list[str]:
    """Ids of the nodes that a block calls for, in order, as far as the parent's text tells of them."""
    known = states(text)
    return [node for node in _START.findall(block) if node in known][:MOST_CHILDREN]


def child_prompt(node: str, text: str) -> str:
    """What the child at a node is given; `text` is the parent's, prompt included."""
    target = found[1] if (found := _STATE.search(text)) else "0"
    state = states(text)[node]
    operations = ", ".join(map(repr, state.operations))
    return f"Moving to Node #{node}\nCurrent State: {target}:[{state.numbers}], Operations: [{operations}]"


def solution(text: str) -> str | None:
    """The path that a search restates at its end: what stands after its last `Goal Reached` but one."""
    parts = text.split(REACHED)
    return parts[-2].partition("\n")[2] + REACHED if len(parts) > 2 else None


def render_join(nodes: Sequence[str], children: Sequence[str]) -> str:
    """What stands in the block's place: for each node, what the text of its child comes to."""
    out = f"{JOINED}\n"
    for i, (node, child) in enumerate(zip(nodes, children, strict=True)):
        found = solution(child)
        where = f"in Sub Search {i} at level 1 at Node #{node}>\n"
        out += f"<No Solution {where}" if found is None else f"<{REACHED} {where}{found}\n"
    return f"{out}{END_JOINED}\n"
