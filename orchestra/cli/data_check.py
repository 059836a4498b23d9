"""`orchestra data check`: are these demonstrations right, and how parallel are they?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from orchestra.errors import OrchestraError, UsageError, one_of

_MOST_SHOWN = 100


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSONL, parquet, a folder of datasets, or an id.")],
    language: Annotated[str, typer.Option("--language", help="Of rows that do not say.")] = "plain",
    model: Annotated[
        str | None,
        typer.Option("--model", "--tokenizer", metavar="PATH_OR_ID", help="Whose tokens; default: words are counted."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of a training row.")] = None,
    split: Annotated[str, typer.Option(help="Of a data set with several.")] = "train",
    revision: Annotated[str | None, typer.Option(help="Commit of a Hugging Face data set.")] = None,
) -> None:
    """Validate every row, with line and column, and tell how parallel they are. Ends with 1 if a row is malformed."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from orchestra.protocols import PROTOCOLS
    from orchestra.training.checks import Counts, check

    if language != "plain" and language not in PROTOCOLS:
        raise UsageError(one_of("language", language, [*PROTOCOLS, "plain"]))
    told: dict[str, Any] = {"language": language, "longest": max_tokens}
    if model is not None:
        from orchestra.runtime.local.prompts import Prompts
        from orchestra.runtime.local.sources import tokenizer_at

        tokenizer = tokenizer_at(model)
        told |= {"encoder": Prompts(tokenizer, 1 << 40), "eos": tokenizer.eos_token_id or 0}
    counts, wrong, rows = Counts(), 0, set()
    for finding in check(_records(file, split, revision), counts, **told):
        wrong += 1
        rows.add(finding.row)
        if wrong <= _MOST_SHOWN:
            print(finding)
    if wrong > _MOST_SHOWN:
        print(f"and {wrong - _MOST_SHOWN} findings more")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for line in counts.table("words" if model is None else "tokens"):
        table.add_row(*line)
    Console(highlight=False).print(table)
    if wrong:
        raise OrchestraError(f"{len(rows)} of {counts.rows + len(rows)} rows of {file} are not right")


def _records(file: str, split: str, revision: str | None) -> Iterable[tuple[int, Mapping[str, Any] | str]]:
    """Rows with their numbers: those of lines in a JSONL file."""
    from orchestra.training.texts import read_lines, read_records

    if Path(file).suffix in (".jsonl", ".json"):
        return read_lines(Path(file))
    return enumerate(read_records(file, split, revision), 1)
