"""`orchestra train`: train a model from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from orchestra.errors import UsageError
from orchestra.extras import require

if TYPE_CHECKING:
    from orchestra.training.config import ParScaleConfig
    from orchestra.training.grpo_config import GRPORun
    from orchestra.training.sft_config import SupervisedConfig

Config = TypeVar("Config", "SupervisedConfig", "ParScaleConfig", "GRPORun")

app = typer.Typer(help="Train a model from a YAML file.", no_args_is_help=True)


@app.command()
def sft(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The training run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Supervised training on demonstrations."""
    from orchestra.training.sft_config import SupervisedConfig

    loaded = _load(SupervisedConfig, config, overrides, resume)
    from orchestra.training.arguments import processes
    from orchestra.training.sft import train_sft

    processes().print(train_sft(loaded, resume=resume))  # once, of however many processes


@app.command()
def parscale(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The training run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Put parallel streams on a trained model (ParScale) and train them, or all of it."""
    from orchestra.training.config import ParScaleConfig

    loaded = _load(ParScaleConfig, config, overrides, resume)
    from orchestra.training.parscale import train_parscale

    print(train_parscale(loaded, resume=resume))


@app.command()
def grpo(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The training run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value ...]", help="Changes to it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Reinforcement learning on rollouts of strategies."""
    from orchestra.training.grpo_config import GRPORun

    loaded = _load(GRPORun, config, overrides, resume)
    from orchestra.training.arguments import processes
    from orchestra.training.grpo_run import train_grpo

    processes().print(train_grpo(loaded, resume=resume))  # once, of however many processes


def _load(kind: type[Config], path: Path, overrides: list[str] | None, resume: bool) -> Config:
    """The configuration of a run that can be started (or resumed); otherwise raises `UsageError`."""
    require("torch", "transformers", "trl", what="training", extra="train")
    if not path.is_file():
        raise UsageError(f"there is no configuration file {path}")
    from orchestra.training.config import read_config

    try:
        loaded = read_config(kind, path, overrides or [])
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path}: {error}") from error
    if resume and not list(Path(loaded.output).glob("checkpoint-*")):
        raise UsageError(f"nothing to resume: there is no checkpoint in {loaded.output}")
    return loaded
