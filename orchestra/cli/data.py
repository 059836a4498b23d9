"""`orchestra data`: make, check and look at training data."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from orchestra.cli import data_check, data_make
from orchestra.errors import UsageError
from orchestra.extras import require

app = typer.Typer(help="Make, check and look at training data.", no_args_is_help=True)
app.command("make")(data_make.command)
app.command("check")(data_check.command)


class Layout(Enum):
    """How texts become rows."""

    graph = "graph"
    trie = "trie"


@app.command()
def preview(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows or texts: a folder of datasets, parquet, JSONL, or an id.")
    ],
    row: Annotated[int, typer.Option("--row", help="Which row, from 0.")] = 0,
    model: Annotated[
        str,
        typer.Option(
            "--model", help="Whose tokenizer the rows are in: a folder or an id; default: the embedded model's."
        ),
    ] = "",
    language: Annotated[str, typer.Option("--language", help="Of texts that do not say.")] = "plain",
    layout: Annotated[Layout, typer.Option("--layout", help="Of texts; see docs/sft.md.")] = Layout.graph,
    entries: Annotated[str, typer.Option("--entries", metavar="A:B", help="Which entries the terminal shows.")] = "",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a picture: FILE.html or FILE.png.", show_default=False)
    ] = None,
) -> None:
    """Show a row's tokens, positions, mask and loss."""
    require("torch", "datasets", what="training data", extra="train")
    if out is not None and out.suffix not in (".html", ".png"):
        raise UsageError(f"--out is a .html or .png file, not {out.name}")
    first, last = _range(entries)
    from rich.console import Console

    from orchestra.training import preview as pictures

    chosen, words = pictures.read(file, row, model, language, layout.value)
    title = f"{Path(file).name}, row {row}"
    if out is None:
        console = Console()
        fitting = max(10, console.width - 50)
        end = min(len(chosen), last if last is not None else first + fitting)
        if not 0 <= first < end:
            raise UsageError(f"--entries {entries}: the row has entries 0 to {len(chosen) - 1}")
        console.print(pictures.terminal(chosen, words, first, end))
        rest = (
            f"; {end - first} are shown (--entries A:B, or --out FILE.html for all)"
            if end - first < len(chosen)
            else ""
        )
        console.print(f"{len(chosen)} entries{rest}")
    elif out.suffix == ".html":
        out.write_text(pictures.html(chosen, words, title), encoding="utf-8")
        print(out)
    else:
        require("matplotlib", what="a picture as PNG", extra="train")
        pictures.png(chosen, words, out, title)
        print(out)


def _range(entries: str) -> tuple[int, int | None]:
    """`A:B` as numbers; raises `UsageError`."""
    first, colon, last = entries.partition(":")
    try:
        return int(first or 0), int(last) if last or (entries and not colon) else None
    except ValueError as error:
        raise UsageError(f"--entries is of the form A:B, got {entries!r}") from error
