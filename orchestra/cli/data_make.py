"""`orchestra data make`: training data from symbolic solvers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestra.extras import require


def command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="countdown, apr or arithmetic.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows.")] = 1000,
    seed: Annotated[int, typer.Option(help="Fixes them.")] = 0,
    level: Annotated[str, typer.Option(help="Of Countdown: small or hard.")] = "hard",
    behaviours: Annotated[
        str, typer.Option(metavar="NAME,...", help="Which, in turn; default: all that the task has.")
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="PATH_OR_ID", help="Whose tokens; default: the embedded model's, or plain words.")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="runs/data/TASK")] = None,
) -> None:
    """Write demonstrations of symbolic solvers as a data set of training rows, with a card."""
    require("datasets", "transformers", what="training data", extra="train")
    from orchestra.training.made import Wanted, make

    folder = out or Path("runs") / "data" / task
    chosen = tuple(name.strip() for name in behaviours.split(",") if name.strip())
    wanted = Wanted(task, rows, seed, chosen, level, model)
    said = f"orchestra data make {task} --rows {rows} --seed {seed}"
    said += f" --level {level}" if task == "countdown" else ""
    said += f" --behaviours {','.join(chosen)}" if chosen else ""
    said += f" --model {model}" if model else ""
    counts = make(wanted, folder, said)
    print(f"{folder}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
