"""`orchestra engines`: the forms of engine URLs, and what one that is given can do."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.padding import Padding

    from orchestra.runtime.forms import EngineForm


def command(
    url: Annotated[str | None, typer.Argument(metavar="[URL]", help="Open this one and say what it is.")] = None,
) -> None:
    """Explain the forms of engine URLs; with a URL, open that engine and say what it is and can do."""
    if url is not None:
        asyncio.run(_meet(url))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orchestra.cli.strategies import attributes
    from orchestra.runtime.forms import ENGINES
    from orchestra.runtime.limits import Limits

    console = Console(highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("URL", style="bold cyan", overflow="fold", max_width=34)
    table.add_column("engine, and its parameters", ratio=1)
    for form in ENGINES:
        table.add_row(form.url.replace("[", "\\["), _about(form), end_section=True)
    console.print(table)
    console.print("Servers also take these limits:")
    said = attributes(inspect.cleandoc(Limits.__doc__ or ""))
    limits = {f"{field.name}={field.default:g}": said[field.name].split(". ")[0] for field in fields(Limits)}
    console.print(_parameters(limits))
    console.print("\n[dim]`orchestra engines URL` opens one and says what it is. More: docs/engines.md[/dim]")


def _about(form: EngineForm) -> Group:
    from rich.console import Group
    from rich.text import Text

    about = [Text(form.about), Text(f"can: {form.can}", style="yellow")]
    return Group(*about, _parameters(form.parameters)) if form.parameters else Group(*about)


def _parameters(meanings: Mapping[str, str]) -> Padding:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="green")
    grid.add_column()
    for name, meaning in meanings.items():
        grid.add_row(Text(name), Text(meaning, style="dim"))
    return Padding(grid, (0, 0, 0, 2))


async def _meet(url: str) -> None:
    from rich.console import Console

    import orchestra
    from orchestra.cli import options

    options.quiet(url)
    async with orchestra.connect(url) as connection:
        engine = connection.engine
        facts = {key: str(value) for key, value in engine.facts().items() if value is not None}
        can = ", ".join(sorted(engine.capabilities)) or "independent samples"
        console = Console(highlight=False)
        console.print(engine.name, style="bold cyan", markup=False)
        console.print(_parameters(facts | {"can": can}))
