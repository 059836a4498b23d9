"""Options that several commands share, and what they check before anything heavy is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from orchestra.errors import UsageError

_STRATEGY = "Spec string, as in 'first_finish(samples=8)'; `orchestra strategies` lists them."
_ENGINE = "Engine URL; `orchestra engines` lists the forms."

Strategy = Annotated[str, typer.Option("--strategy", "-s", metavar="SPEC", help=_STRATEGY)]
Engine = Annotated[str, typer.Option("--engine", "-e", metavar="URL", help=_ENGINE)]
Alias = Annotated[
    list[str] | None,
    typer.Option(
        "--alias",
        metavar="NAME=URL",
        help="A further engine for strategies that name one, as in judge(engine='NAME'). Repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.", min=0)]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: the strategy's own.", min=0, max=100, show_default=False)
]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens with this total.", min=0, max=1)]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of one generation.", min=1, show_default=False)]
JsonSchema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema", metavar="FILE", help="JSON schema that every generation satisfies.", show_default=False
    ),
]
Regex = Annotated[
    str | None, typer.Option(metavar="PATTERN", help="Pattern that every generation matches.", show_default=False)
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="Limits of a run, as in 'critical_path_tokens=384,wall_seconds=10'.", show_default=False
    ),
]


def engines(alias: list[str] | None) -> dict[str, str]:
    """The engines of `--alias` options, by name.

    Raises:
        UsageError: one is not NAME=URL, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in alias or ():
        name, equals, url = text.partition("=")
        if not (name.isidentifier() and equals and url):
            raise UsageError(f"--alias is NAME=URL, as in judge=sglang://127.0.0.1:30001, not {text!r}")
        if name in found:
            raise UsageError(f"--alias names {name!r} twice")
        found[name] = url
    return found


def check_sampling(seed: int, temperature: float | None, top_p: float) -> None:
    """Refuse what the ranges of the options let through.

    Raises:
        UsageError: a seed of more than 63 bits, a temperature that is not a number, or a top-p of nothing.
    """
    if seed >= 2**63:
        raise UsageError(f"--seed is below 2**63, not {seed}")
    if temperature is not None and temperature != temperature:
        raise UsageError("--temperature is not a number")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p is above 0 and at most 1, not {top_p}")


def read_schema(path: Path | None) -> str | None:
    """The text of `--json-schema`.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        return None if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --json-schema {path}: {getattr(error, 'strerror', None) or error}") from None


def check_writable(path: Path) -> None:
    """Find out before the work, not after it, that a file cannot be written.

    Raises:
        UsageError: it cannot.
    """
    folder = path.parent
    if not folder.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {folder}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UsageError(f"cannot write {path}")


def quiet(*engines: str) -> None:
    """Keep transformers from writing between our lines. Call it before engines are opened.

    What the user set in the environment wins, and a model that has to be downloaded keeps its progress bar.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if all(url.startswith("demo") or Path(url.partition("?")[0].removeprefix("local:")).is_dir() for url in engines):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
