"""A finished run as a tree in the terminal: the trunk's turns, and under each the threads it started."""

from __future__ import annotations

from collections.abc import Iterable

from rich.text import Text
from rich.tree import Tree

from orchestra.graph import Node, ThreadGraph

_MARKS = {"cancelled": ("✗", "dim"), "length": ("▪", "yellow"), "error": ("!", "red")}


def thread_tree(graph: ThreadGraph, width: int = 100, most: int = 24) -> Tree:
    """The tree of a run: a line a turn of the trunk, a line a thread.

    Args:
        graph: of a finished run.
        width: characters of a line.
        most: threads shown under one parent.
    """
    nodes = [node for node in graph.nodes if len(node)]
    root = nodes[0].spans[0] if nodes else None
    tree = Tree(Text(_flat(root.text) if root else "nothing", style="bold"), guide_style="dim")
    threads: dict[tuple[int, ...], list[Node]] = {}
    places: dict[tuple[int, ...], Tree] = {(): tree}
    order: list[tuple[tuple[int, ...], list[Node]]] = []
    for node in nodes:
        path = tuple(node.path)
        if path and path in threads:
            threads[path].append(node)
        else:
            # Every node of the trunk is a turn of its own; a thread's nodes make one line together.
            threads[path] = [node]
            order.append((path, threads[path]))
    for path, members in order:
        above = path
        while above not in places or (above == path and path):
            above = above[:-1]
        if not path:
            line = _turn(members[0], width)
            if line is not None:
                places[()] = tree.add(line)
        elif path[-1] < most:
            places[path] = places[above].add(_thread(path, members, width))
        elif path[-1] == most:
            siblings = [other for other, _ in order if other[:-1] == path[:-1] and other[-1:] >= (most,)]
            places[above].add(Text(f"… and {len(siblings)} more", "dim"))
    return tree


def _turn(node: Node, width: int) -> Text | None:
    line = Text()
    for span in node.spans:
        text = _flat(span.text)
        if span.origin == "prompt" or not text:
            continue
        sampled = span.origin == "sampled"
        shown = _shorten(text, width * 2 // 3 if sampled else width // 3)
        line.append(("  " if line else "") + shown, "" if sampled else "dim cyan")
    if tokens := node.count("sampled"):
        line.append(f"  {tokens} tokens", "dim")
    return line if line else None


def _thread(path: tuple[int, ...], members: Iterable[Node], width: int) -> Text:
    members = list(members)
    said = "".join(span.text for node in members for span in node.spans if span.origin == "sampled")
    given = "".join(span.text for node in members for span in node.spans if span.origin != "sampled")
    mark, style = _MARKS.get(members[-1].finish_reason or "", ("", ""))
    lines = [line for line in said.splitlines() if line.strip()]
    tokens = sum(node.count("sampled") for node in members)
    line = Text()
    line.append(f"{'.'.join(map(str, path))} ", "magenta")
    if given.strip():
        line.append(f"{_shorten(_flat(given), width * 5 // 9)} → ", "cyan" if style != "dim" else style)
    line.append(_shorten(_flat(lines[-1]) if lines else "", width * 4 // 9), style)
    line.append(f"  {tokens} tokens", "dim")
    if mark:
        line.append(f" {mark} {members[-1].finish_reason}", style)
    return line


def _flat(text: str) -> str:
    return " ".join(text.split())


def _shorten(text: str, width: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= width else f"{text[: width * 2 // 3]} … {text[-(width // 3) :]}"
