"""`orchestra tasks`: what can be evaluated."""

from __future__ import annotations


def command() -> None:
    """List the tasks with their levels and splits; the first of each is the default."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orchestra.evaluation.tasks import task_files

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "levels", "splits"):
        table.add_column(heading, style="cyan" if heading == "task" else None, no_wrap=True)
    table.add_column("items", justify="right")
    table.add_column("repeats", justify="right")
    table.add_column("what it is")
    for file in task_files().values():
        about = file.description + (f"\n[dim]{file.citation}[/dim]" if file.citation else "")
        levels, splits = ", ".join(file.levels), ", ".join(file.splits)
        table.add_row(file.name, levels, splits, f"{file.items:,}", str(file.repeats), about)
    Console(highlight=False).print(table)
