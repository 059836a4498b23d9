"""Parts of a row that do not see each other, as rows of their own: the same losses for a smaller mask.

A parent of `spawn_join` and its children have contexts of their own. As one row their mask is mostly empty, and dense
attention pays for all of it; apart, they go where there is room.
"""

from __future__ import annotations

from collections.abc import Sequence

from orchestra.training.flatten import Row


def families(row: Row) -> list[list[int]]:
    """The entries of the row's parts, in order: those of different parts neither see nor predict each other.

    Echoes that would stand right after the token that they repeat are left out.
    """
    of = {node: node for node in row.views}

    def root(node: int) -> int:
        while of[node] != node:
            of[node] = node = of[of[node]]
        return node

    for node, view in row.views.items():
        for other in view:
            if other in of:
                of[root(node)] = root(other)
    found: dict[int, list[int]] = {}
    for entry, node in enumerate(row.nodes):
        family = found.setdefault(root(node), [])
        if not (family and row.echoes[entry] and _place(row, family[-1]) == _place(row, entry)):
            family.append(entry)
    return list(found.values())


def select(row: Row, entries: Sequence[int]) -> Row:
    """Some entries of a row, in order, with all that they see; what predicts one is the entry before it."""
    nodes = {row.nodes[i] for i in entries}
    return Row(
        tokens=[row.tokens[i] for i in entries],
        positions=[row.positions[i] for i in entries],
        nodes=[row.nodes[i] for i in entries],
        indices=[row.indices[i] for i in entries],
        echoes=[row.echoes[i] for i in entries],
        weights=[row.weights[i] for i in entries],
        predecessors=[None if row.predecessors[entry] is None else i - 1 for i, entry in enumerate(entries)],
        views={node: view for node, view in row.views.items() if node in nodes},
    )


def pieces(row: Row) -> list[Row]:
    """The row's parts as rows."""
    found = families(row)
    return [row] if len(found) == 1 else [select(row, entries) for entries in found]


def _place(row: Row, entry: int) -> tuple[int, int]:
    return row.nodes[entry], row.indices[entry]
