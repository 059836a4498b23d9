"""`orchestra strategies`: what there is, with parameters."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

    from orchestra.strategies import Strategy


def command() -> None:
    """List the strategies with their parameters, defaults, needs and papers."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orchestra.strategies import registry

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("strategy", style="bold cyan", no_wrap=True)
    table.add_column("what it does, and its parameters", ratio=1)
    table.add_column("needs", style="yellow")
    known = registry()
    for i, (name, kind) in enumerate(sorted(known.items())):
        table.add_row(name, _about(kind), _needs(kind), end_section=i < len(known) - 1)
    Console(highlight=False).print(table)


def _about(kind: type[Strategy]) -> Group:
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        said |= attributes(inspect.cleandoc(base.__doc__ or ""))
    parameters = Table.grid(padding=(0, 2))
    parameters.add_column(style="green", no_wrap=True)
    parameters.add_column()
    for name, field in kind.model_fields.items():
        if field.exclude:
            continue  # Python only: a spec cannot hold it
        default = "" if field.is_required() else f"={_spec(field.get_default(call_default_factory=True))}"
        meaning = field.description or said.get(name, "")
        parameters.add_row(Text(name + default), Text(meaning, style="dim"))
    parts: list[RenderableType] = [
        Text(" ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())),
        Padding(parameters, (0, 0, 0, 2)),
    ]
    if kind.paper:
        parts.append(Text(kind.paper, style="italic dim"))
    return Group(*parts)


def _needs(kind: type[Strategy]) -> str:
    required = any(field.is_required() for field in kind.model_fields.values())
    needs = kind.needs if required else kind().requirements()
    return "\n".join(sorted(needs)) or "any engine"


def _spec(value: object) -> str:
    """A default as a spec would write it."""
    from orchestra.strategies import Strategy

    return value.to_spec() if isinstance(value, Strategy) else repr(value)


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
