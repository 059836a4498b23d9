"""Parts of a row that do not see each other, as rows of their own: the same losses for a smaller mask.

A parent of `spawn_join` and its children have contexts of their own. As one row their mask is mostly empty, and dense
attention pays for all of it; apart, they go where there is room.
"""

from __future__ import annotations

from orchestra.training.flatten import Row


def pieces(row: Row) -> list[Row]:
    """The row's parts, in order: entries of different parts neither see nor predict each other."""
    part = {node: node for node in row.views}

    def root(node: int) -> int:
        while part[node] != node:
            part[node] = node = part[part[node]]
        return node

    for node, view in row.views.items():
        for other in view:
            if other in part:
                part[root(node)] = root(other)
    found: dict[int, list[int]] = {}
    for place, node in enumerate(row.nodes):
        found.setdefault(root(node), []).append(place)
    return [row] if len(found) == 1 else [_piece(row, places) for places in found.values()]


def _piece(row: Row, places: list[int]) -> Row:
    at = {place: index for index, place in enumerate(places)}
    piece = Row(
        [row.tokens[i] for i in places],
        [row.positions[i] for i in places],
        [row.nodes[i] for i in places],
        [row.indices[i] for i in places],
        [row.echoes[i] for i in places],
        [row.weights[i] for i in places],
        [None if (before := row.predecessors[i]) is None else at[before] for i in places],
    )
    piece.views = {node: row.views[node] for node in dict.fromkeys(piece.nodes)}
    return piece
