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
Seed = Annotated[int, typer.Option(help="Everything random follows from it.", min=0)]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy. Default: the strategy's own.", min=0, max=100, show_default=False)
]
TopP = Annotated[float, typer.Option(help="Sample from the most likely tokens with this total.", min=0, max=1)]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of one generation.", min=1, show_default=False)]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC", help="Limits of a run, as in 'critical_path_tokens=384,wall_seconds=10'.", show_default=False
    ),
]


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


def quiet(engine: str) -> None:
    """Keep transformers from writing between our lines. Call it before an engine is opened.

    What the user set in the environment wins, and a model that has to be downloaded keeps its progress bar.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    model = engine.partition("?")[0].removeprefix("local:")
    if engine.startswith("demo") or Path(model).is_dir():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
