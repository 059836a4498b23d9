"""`orchestra strategies`: what there is, and one in full."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from orchestra.spec import Named

_WIDTH = 120  # lines longer than this are hard to read, however wide the terminal


def command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Explain this strategy or scorer.")] = None,
) -> None:
    """List the strategies, and the scorers that best_of takes; with a name, explain one with its parameters."""
    from rich.console import Console

    from orchestra.strategies import Scorer, registry

    console = Console(highlight=False)
    console.width = min(console.width, _WIDTH)
    strategies, scorers = registry(), Scorer.known()
    if name is None:
        console.print(_overview("strategy", strategies))
        console.print(_overview("scorer (of best_of)", scorers))
        console.print("[dim]`orchestra strategies NAME` explains one, and what its parameters mean.[/dim]")
        return
    console.print(*_named(name, strategies, scorers), sep="\n")


def _named(name: str, *groups: Mapping[str, type[Named]]) -> Iterable[Group]:
    """Every strategy and scorer of this name, in full."""
    from orchestra.errors import UsageError, one_of

    found = [_about(group[name]) for group in groups if name in group]
    if not found:
        raise UsageError(one_of("strategy or scorer", name, {known for group in groups for known in group}))
    return found


def _overview(heading: str, kinds: Mapping[str, type[Named]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column(heading, style="bold cyan")
    table.add_column("what it does", ratio=1)
    for name, kind in kinds.items():
        lines = [Text(re.split(r"[.;] |\.$", _summary(kind))[0] + ".")]
        if needs := _needs(kind):
            lines[0].append(f" Needs {needs}.", "yellow")
        if parameters := [parameter for parameter, _ in _parameters(kind)]:
            lines.append(Text(", ".join(parameters), "green"))
        if kind.paper:
            lines.append(Text(kind.paper, "dim"))
        table.add_row(name, Text("\n").join(lines))
    return table


def _about(kind: type[Named]) -> Group:
    """Everything about one, for a terminal."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parameters = Table.grid(padding=(0, 2))
    parameters.add_column(style="green", no_wrap=True)
    parameters.add_column()
    for parameter, meaning in _parameters(kind):
        parameters.add_row(Text(parameter), Text(meaning))
    parts: list[RenderableType] = [Text(f"{kind.name} ({kind.kind})", "bold cyan"), Text(_summary(kind))]
    if parameters.row_count:
        parts.append(Padding(parameters, (0, 0, 0, 2)))
    parts.append(Text(f"needs: {_needs(kind) or 'any engine'}", "yellow"))
    if kind.paper:
        parts.append(Text(f"paper: {kind.paper}", "dim"))
    return Group(*parts)


def _parameters(kind: type[Named]) -> Iterator[tuple[str, str]]:
    """Each parameter with its default, and what it means; in the order of the docstrings, the own one first."""
    said: dict[str, str] = {}
    for base in kind.__mro__:
        said = said | {k: v for k, v in attributes(inspect.cleandoc(base.__doc__ or "")).items() if k not in said}
    order = list(said)
    known = kind.model_fields.items()
    for name, field in sorted(known, key=lambda item: order.index(item[0]) if item[0] in said else len(order)):
        if not field.exclude:  # else Python only: a spec cannot hold it
            default = "" if field.is_required() else f"={_spec(field.get_default(call_default_factory=True))}"
            yield name + default, field.description or said.get(name, "")


def _summary(kind: type[Named]) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def _needs(kind: type[Named]) -> str:
    required = any(field.is_required() for field in kind.model_fields.values())
    needs = kind.needs if required else kind().requirements()
    return ", ".join(sorted(needs))


def _spec(value: Any) -> str:
    """A default as a spec would write it."""
    from orchestra.spec import render

    return render(value)


def attributes(docstring: str) -> dict[str, str]:
    """The `Attributes:` section of a Google-style docstring: what each name means."""
    _, _, section = docstring.partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.split("\n\n")[0].splitlines():
        if match := re.match(r"    (\w[\w, ]*): (.*)", line):
            names = match.group(1).split(", ")
            found.update(dict.fromkeys(names, match.group(2)))
        else:
            found.update({name: f"{found[name]} {line.strip()}" for name in names})
    return found
