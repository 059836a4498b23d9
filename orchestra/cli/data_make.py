"""`orchestra data make`: training data from symbolic solvers, and from evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestra.errors import UsageError
from orchestra.evaluation.store import MANIFEST
from orchestra.extras import require


def command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="countdown, apr, arithmetic, or the folder of a run.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows.")] = 1000,
    seed: Annotated[int, typer.Option(help="Fixes them.")] = 0,
    level: Annotated[str, typer.Option(help="Of Countdown: small or hard.")] = "hard",
    behaviours: Annotated[
        str, typer.Option(metavar="NAME,...", help="Which, in turn; default: all that the task has.")
    ] = "",
    model: Annotated[
        str, typer.Option(metavar="PATH_OR_ID", help="Whose tokens; default: the embedded model's, or plain words.")
    ] = "",
    per_item: Annotated[int, typer.Option(min=1, help="Of a run: most samples of an item.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Folder to write.", show_default="runs/data/TASK")] = None,
) -> None:
    """Write demonstrations of symbolic solvers, or what a run got right, as a data set of training rows with a card."""
    require("datasets", "transformers", what="training data", extra="train")
    folder = out or Path("runs") / "data" / Path(task).name
    if (Path(task) / MANIFEST).is_file():
        from orchestra.training.rejection import make_from_run

        if folder.exists():
            raise UsageError(f"{folder} is there already")
        said = f"orchestra data make {task} --per-item {per_item}"
        found = make_from_run(task, folder, per_item=per_item, command=said)
        print(f"{folder}: {found.kept:,} of {found.correct:,} correct samples, of {found.items:,} items")
        return
    from orchestra.training.made import Wanted, make

    chosen = tuple(name.strip() for name in behaviours.split(",") if name.strip())
    wanted = Wanted(task, rows, seed, chosen, level, model)
    said = f"orchestra data make {task} --rows {rows} --seed {seed}"
    said += f" --level {level}" if task == "countdown" else ""
    said += f" --behaviours {','.join(chosen)}" if chosen else ""
    said += f" --model {model}" if model else ""
    counts = make(wanted, folder, said)
    print(f"{folder}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
