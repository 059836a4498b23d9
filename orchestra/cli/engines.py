"""`orchestra engines`: the forms of engine URLs."""

from __future__ import annotations


def command() -> None:
    """List the forms of engine URLs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orchestra.runtime.connect import ENGINES

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("URL", style="cyan", no_wrap=True)
    table.add_column("engine")
    for form, description in ENGINES.items():
        table.add_row(form.replace("[", "\\["), description)
    Console(highlight=False).print(table)
