"""The tree of ordinary causal stretches: which path of the cache begins with given tokens.

A stretch hangs on its parent after some number of the parent's tokens; no stretch is cut up when another branches off
in its middle. Paths with equal tokens may exist twice, when one run made them as two nodes. What comes after a reuse
join or a concurrent node is not in the tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from orchestra.runtime.local.nodes import NodeState, Run

NOTHING = -1
"""The first token of a stretch that has none yet: a generation that is to begin."""


class Match(NamedTuple):
    """The path that was found: each stretch with the number of its tokens up to which it is followed."""

    steps: list[tuple[NodeState, int]]
    tokens: int


class _Trail(NamedTuple):
    """A path, from its end back."""

    before: _Trail | None
    state: NodeState
    stop: int


def match(state: NodeState, offset: int, tokens: Sequence[int], run: Run) -> Match:
    """Follow `tokens` from a place in the tree: of all paths the one with the most keys and values, then the longest.

    Args:
        state: where the place is.
        offset: the place, in tokens of `state`.
        tokens: what comes after it.
        run: whose node asks; tokens that other nodes of this run hold are passed by.
    """
    best, trail = (0, 0), None
    todo: list[tuple[NodeState, int, int, int, _Trail | None]] = [(state, offset, 0, 0, None)]
    while todo:
        state, offset, at, found, before = todo.pop()
        same = 0
        if state.holders.get(run, 0) == offset:
            same = _common(state.tokens, offset, tokens, at)
        here = before
        if same:
            found += max(0, min(state.done, offset + same) - offset)
            here = _Trail(before, state, offset + same)
            if (found, at + same) > best:
                best, trail = (found, at + same), here
        for branch, children in state.branches.items():
            if offset <= branch <= offset + same and at + branch - offset < len(tokens):
                _file(children)
                kept = found - max(0, min(state.done, offset + same) - max(branch, offset)) if same else found
                cut = _Trail(before, state, branch) if branch > offset else before
                for child in children.get(tokens[at + branch - offset], ()):
                    todo.append((child, 0, at + branch - offset, kept, cut))
    steps = []
    while trail is not None:
        steps.append((trail.state, trail.stop))
        trail = trail.before
    return Match(steps[::-1], best[1])


def _common(one: Sequence[int], i: int, other: Sequence[int], j: int) -> int:
    """How many tokens are equal from `one[i]` and `other[j]` on."""
    most = min(len(one) - i, len(other) - j)
    if one[i : i + most] == other[j : j + most]:
        return most
    return next(k for k in range(most) if one[i + k] != other[j + k])


def _file(children: dict[int, list[NodeState]]) -> None:
    """Put stretches that had no token when they were attached where they belong, if they have one now."""
    waiting = children.pop(NOTHING, ())
    for child in waiting:
        children.setdefault(child.tokens[0] if child.tokens else NOTHING, []).append(child)


def attach(child: NodeState) -> None:
    """Hang a stretch on its parent."""
    assert child.parent is not None
    children = child.parent.branches.setdefault(child.offset, {})
    children.setdefault(child.tokens[0] if child.tokens else NOTHING, []).append(child)


def detach(child: NodeState) -> None:
    """Take a stretch, and what hangs on it, out of the tree."""
    assert child.parent is not None
    branches = child.parent.branches
    children = branches[child.offset]
    _file(children)
    first = child.tokens[0] if child.tokens else NOTHING
    children[first].remove(child)
    if not children[first]:
        del children[first]
    if not children:
        del branches[child.offset]
    child.parent = None


def split(state: NodeState, length: int, serial: int) -> NodeState:
    """Cut a stretch into its first `length` tokens, which it keeps, and a new one; keys and values are the caller's."""
    tail = NodeState(serial, state.start + length, state.tokens[length:], state, length)
    del state.tokens[length:]
    for branch in [branch for branch in state.branches if branch > length]:
        tail.branches[branch - length] = state.branches.pop(branch)
    for child in children_of(tail):
        child.parent, child.offset = tail, child.offset - length
    attach(tail)
    return tail


def children_of(state: NodeState, beyond: int = 0) -> list[NodeState]:
    """The stretches that hang on one after more than `beyond` tokens."""
    return [
        child
        for branch, children in state.branches.items()
        if branch > beyond
        for group in children.values()
        for child in group
    ]


def below(state: NodeState) -> Iterator[NodeState]:
    """All stretches that hang on one, directly or not."""
    todo = children_of(state, -1)
    while todo:
        child = todo.pop()
        yield child
        todo += children_of(child, -1)
