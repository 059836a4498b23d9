"""`orchestra eval`: a strategy on a task, with accuracy, its error and its cost."""

from __future__ import annotations

import asyncio
import re
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestra.cli import options
from orchestra.errors import OrchestraError, UsageError

if TYPE_CHECKING:
    from orchestra.evaluation.store import Plan, Record, RunStore
    from orchestra.evaluation.tasks import Task

_MOST_SAMPLES = 10_000_000


class Interrupted(OrchestraError):
    """Ctrl-C: what was finished is saved."""

    exit_code = 130


def command(
    task: Annotated[str, typer.Argument(metavar="TASK", help="`orchestra tasks` lists them.")],
    strategy: options.Strategy = "sample",
    engine: options.Engine = "demo",
    alias: options.Alias = None,
    level: Annotated[str | None, typer.Option(help="Difficulty.", show_default="the task's first")] = None,
    split: Annotated[str | None, typer.Option(help="Set of items.", show_default="the task's first")] = None,
    repeats: Annotated[int | None, typer.Option(help="Samples an item.", min=1, show_default="the task's")] = None,
    limit: Annotated[int | None, typer.Option(help="Number of items.", min=1, show_default="the task's")] = None,
    seed: options.Seed = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Run folder; goes on with the run in it.", show_default="runs/NAME-TIME"),
    ] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = 1.0,
    concurrency: Annotated[int, typer.Option(help="Samples that run at a time.", min=1, max=100_000)] = 32,
    budget: options.Budget = None,
    traces: Annotated[
        bool, typer.Option("--traces", help="Keep thread graphs too, to learn from (orchestra data make DIR).")
    ] = False,
) -> None:
    """Evaluate a strategy on a task. Every finished sample is kept; the same --out goes on where it stopped."""
    from orchestra.evaluation.store import Plan
    from orchestra.evaluation.tasks import load_task
    from orchestra.spec import parse_budget, parse_strategy

    options.check_sampling(seed, temperature, top_p)
    engines = options.engines(alias)
    options.quiet(engine, *engines.values())
    parsed = parse_strategy(strategy)
    if budget:
        parse_budget(budget)
    loaded = load_task(task, level=level, split=split)
    plan = Plan(
        task=loaded.name,
        parameters=dict(loaded.parameters),
        strategy=parsed.to_spec(),
        engine=engine,
        engines=engines,
        limit=loaded.file.items if limit is None else limit,
        repeats=loaded.file.repeats if repeats is None else repeats,
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        max_tokens=loaded.file.max_tokens if max_tokens is None else max_tokens,
        budget=budget,
    )
    if plan.limit * plan.repeats > _MOST_SAMPLES:
        raise UsageError(f"--limit x --repeats is {plan.limit * plan.repeats:,} samples, more than {_MOST_SAMPLES:,}")
    asyncio.run(_evaluate(loaded, plan, out or default_folder(plan), concurrency, traces))


async def _evaluate(task: Task, plan: Plan, folder: Path, concurrency: int, traces: bool) -> None:
    from rich.console import Console

    import orchestra
    from orchestra.evaluation.progress import EvaluationProgress
    from orchestra.evaluation.report import table
    from orchestra.evaluation.runner import evaluate, manifest_of
    from orchestra.evaluation.store import RunStore
    from orchestra.evaluation.summary import summarise
    from orchestra.evaluation.traces import Traces

    items = task.items(plan.limit)
    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    async with orchestra.connect(plan.engine, plan.engines) as connection:
        with RunStore(folder, manifest_of(plan, connection.engine)) as store:
            stored = len(store.records)
            if stored:
                notes.print(f"[dim]going on in {folder}: {stored} of {plan.limit * plan.repeats} samples stored[/dim]")
            title = f"{task.name} · {plan.strategy}"
            progress = EvaluationProgress(
                notes, title, plan.limit * plan.repeats, lambda: connection.engine.load().sampled_tokens
            )
            for record in store.records.values():
                progress.stored(record)

            def keep(record: Record) -> None:
                store.append(record)
                progress.add(record)

            try:
                with progress:
                    await evaluate(
                        connection,
                        task,
                        plan,
                        keep,
                        items=items,
                        skip=set(store.records),
                        concurrency=concurrency,
                        on_outcome=Traces(folder).append if traces else None,
                    )
            except asyncio.CancelledError as error:
                raise Interrupted(_how_to_go_on(store, plan)) from error
            summary = summarise(plan, store.records.values())
            store.finish(summary.model_dump_json(indent=2))
    console.print(table([summary], title=_title(plan)))
    console.print(f"[dim]{folder / 'summary.json'}[/dim]", soft_wrap=True)
    if summary.failed == len(store.records):
        first = next(iter(store.records.values()))
        raise OrchestraError(f"all {summary.failed} samples failed, the first with: {first.error}")


def _how_to_go_on(store: RunStore, plan: Plan) -> str:
    saved = f"{len(store.records)} of {plan.limit * plan.repeats} samples are saved"
    return f"interrupted: {saved}; the same line with --out {store.folder} goes on"


def _title(plan: Plan) -> str:
    """What was run, apart from what the table says itself."""
    from rich.markup import escape

    return escape(" · ".join([plan.task, str(plan.parameters.get("split", "")), plan.engine]))


def default_folder(plan: Plan) -> Path:
    """`runs/TASK-STRATEGY-TIME`."""
    strategy = re.sub(r"[^a-z0-9]+", "-", plan.strategy.lower()).strip("-")[:40]
    level = plan.parameters.get("level")
    name = "-".join(filter(None, [plan.task, level, strategy, f"{datetime.now():%Y%m%d-%H%M%S}"]))
    return Path("runs") / name
