"""The live view of a run: a line a thread, growing; plain lines where there is no terminal."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import rich.box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestra.run import Event

_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")


@dataclass
class _Row:
    path: tuple[int, ...]
    beside: bool = False
    text: str = ""
    state: str = "…"


class LiveView:
    """Shows the events of one run.

    Args:
        console: where to; a terminal gets a view that is redrawn, anything else one line a finished node.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[int, _Row] = {}
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=12, get_renderable=self._draw)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def add(self, event: Event) -> None:
        """Show one more event."""
        if event.kind == "outcome":
            return
        row = self._rows.setdefault(event.node, _Row(event.path, event.beside))
        row.text += event.text
        if event.kind == "end":
            row.state = {"stop": "✓", "length": "▪", "cancelled": "✗", "forced": "·"}.get(
                event.finish_reason or "", "!"
            )
            if self._live is None:
                self._line(event.node, row, event.finish_reason or "")

    def _line(self, node: int, row: _Row, reason: str) -> None:
        text = " ".join(row.text.split())
        self._console.print(f"[{node}] thread {name(row.path)} {reason}: {text}", markup=False, soft_wrap=True)

    def _draw(self) -> Group:
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        room = max(self._console.height - 2, 4)
        rows = [row for row in self._rows.values() if not row.beside]
        workers: dict[tuple[int, ...], list[_Row]] = {}
        for row in self._rows.values():
            if row.beside:
                workers.setdefault(row.path[:-1], []).append(row)
        if workers:
            room = min(room // 3, 4)
        hidden = len(rows) - room
        if hidden > 0:
            # Finished threads leave the screen first.
            ended = [i for i, row in enumerate(rows) if row.state != "…"][: hidden + 1]
            rows = [row for i, row in enumerate(rows) if i not in set(ended)][-room + 1 :]
            table.add_row("", "", Text(f"{hidden + 1} more", style="dim"))
        width = max(self._console.width - 16, 20)
        for row in rows:
            colour = _COLOURS[row.path[-1] % len(_COLOURS)] if row.path else "bold"
            style = "dim" if row.state == "✗" else ""
            table.add_row(
                Text(row.state, style=colour), Text(name(row.path), style=colour), tail(row.text, width, style)
            )
        shown = self._console.height - 3 - table.row_count
        return Group(table, *([_side_by_side(workers, self._console.width, max(shown, 4))] if workers else []))


def _side_by_side(workers: dict[tuple[int, ...], list[_Row]], width: int, height: int) -> Table:
    """A column for each of the workers who read each other, with the end of what it has written."""
    table = Table(expand=True, box=rich.box.SIMPLE_HEAD, padding=(0, 1))
    room = max(8, width // len(workers) - 3)
    cells = []
    for path, steps in sorted(workers.items()):
        colour = _COLOURS[path[-1] % len(_COLOURS)] if path else "bold"
        table.add_column(Text(f"{steps[-1].state} {name(path)}", style=colour), ratio=1)
        lines = [
            piece
            for step in steps
            for line in step.text.strip().splitlines()
            for piece in (textwrap.wrap(line, room) or [""])
        ]
        cells.append(Text("\n".join(lines[-height + 2 :])))
    table.add_row(*cells)
    return table


def name(path: tuple[int, ...]) -> str:
    """A thread's name: its fork path, such as `0.3`."""
    return ".".join(map(str, path)) or "root"


def tail(text: str, width: int, style: str = "") -> Text:
    """The end of a text on one line."""
    flat = " ".join(text.split())
    return Text(flat if len(flat) <= width else "…" + flat[-width + 1 :], style=style)
