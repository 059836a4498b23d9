"""`orchestra train`: train a model from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestra.errors import UsageError
from orchestra.extras import require

app = typer.Typer(help="Train a model from a YAML file.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # Without it typer would take `sft` for the whole of `orchestra train`.
    pass


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The training run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Supervised training on demonstrations."""
    require("torch", "transformers", "trl", what="training", extra="train")
    if not config.is_file():
        raise UsageError(f"there is no configuration file {config}")
    from orchestra.training.config import load_config

    try:
        loaded = load_config(config, overrides or [])
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{config}: {error}") from error
    if resume and not list(Path(loaded.output).glob("checkpoint-*")):
        raise UsageError(f"nothing to resume: there is no checkpoint in {loaded.output}")
    from orchestra.training.sft import train_sft

    print(train_sft(loaded, resume=resume))
