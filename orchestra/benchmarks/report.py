"""Rows of figures as a table in the terminal, in Markdown and in JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Column(NamedTuple):
    """A column: the key in a row, the heading, and how its values are written (a format specification)."""

    key: str
    heading: str
    form: str = ""


@dataclass(slots=True)
class Report:
    """A table that grows.

    Attributes:
        title: what was measured.
        columns: what is shown of a row, in order.
        machine: what it ran on; see `machine`.
        notes: what a reader must know about the figures.
        rows: by key; may hold more than is shown. A missing figure is None.
    """

    title: str
    columns: Sequence[Column]
    machine: dict[str, Any]
    notes: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> Table:
        """For a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=self.title, box=SIMPLE_HEAD, pad_edge=False, title_justify="left", caption=self._ground())
        for i, column in enumerate(self.columns):
            text = bool(self.rows) and isinstance(self.rows[0].get(column.key), str)
            table.add_column(column.heading, justify="left" if i == 0 or text else "right", overflow="fold")
        for cells in self._cells():
            table.add_row(*cells)
        return table

    def markdown(self) -> str:
        """The same, for a page."""
        lines = [f"### {self.title}", "", "| " + " | ".join(column.heading for column in self.columns) + " |"]
        lines.append("|---" + "|---:" * (len(self.columns) - 1) + "|")
        lines += ["| " + " | ".join(cells) + " |" for cells in self._cells()]
        return "\n".join([*lines, "", f"{self.notes} {self._ground()}".strip(), ""])

    def save(self, path: Path) -> None:
        """Write all rows as JSON, and the table beside it as Markdown."""
        whole = {"title": self.title, "machine": self.machine, "notes": self.notes, "rows": self.rows}
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    def _cells(self) -> list[list[str]]:
        return [
            ["-" if (found := row.get(column.key)) is None else format(found, column.form) for column in self.columns]
            for row in self.rows
        ]

    def _ground(self) -> str:
        facts = self.machine
        where = facts.get("device") or f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads"
        return f"{where}; torch {facts['torch']}; load {facts['load']} before."
