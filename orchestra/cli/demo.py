"""`orchestra demo`: the embedded model under several strategies, side by side."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from orchestra.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from orchestra.api import Connection
    from orchestra.evaluation.summary import Summary

_NEXT = """\
Watch threads grow:  [cyan]orchestra run "numbers: 3 7 8 12 target: 55" -s spawn_join --live[/cyan]
Measure with errors: [cyan]orchestra eval countdown --level hard -s "first_finish(samples=8)" --limit 100[/cyan]"""


_ENGINE = "demo?max_batch=256"  # eight samples of many problems at a time fill a larger batch than the default

_MOST_TOKENS = 1536  # of one generation: a search that has lost its way must not hold up the table

_LEGEND = (
    "tokens: all that a problem took. critical path: the longest chain of tokens that had to wait for one another, "
    "which latency follows on parallel hardware; p95: its 95th percentile. seconds: with up to 32 problems at a time. "
    f"A generation ends at {_MOST_TOKENS:,} tokens."
)


class Row(NamedTuple):
    """A row of the demo's table; the same level and strategy on every machine."""

    level: str
    strategy: str
    items: int
    within: bool = False
    """Stop each run at the critical-path length that spawn_join needed (95th percentile) on the same items."""


ROWS = (
    Row("small", "spawn_join", 24),
    Row("small", "sample", 24),
    Row("small", "sample", 24, within=True),
    Row("hard", "spawn_join", 12),
    Row("hard", "sample", 12),
    Row("hard", "self_consistency(samples=4)", 12),
    Row("hard", "first_finish(samples=8)", 12),
    Row("hard", "best_of(samples=4)", 12),
)


def command(
    seed: options.Seed = 0,
    items: Annotated[
        int | None,
        typer.Option(help="Instances on each level; the default takes a minute or two.", min=2, max=10_000),
    ] = None,
) -> None:
    """One trained model, several ways to use it: accuracy, tokens and critical path on held-out problems."""
    options.quiet("demo")
    asyncio.run(_demo(seed, items))


async def _demo(seed: int, count: int | None) -> None:
    from rich.console import Console

    import orchestra
    from orchestra.evaluation.report import table

    console = Console(highlight=False)
    began = time.monotonic()
    async with orchestra.connect(_ENGINE) as connection:
        console.print("\n[bold]One model, several ways to think.[/bold] Held-out Countdown problems: reach the target")
        console.print("with all the numbers. First, a parent thread spawns children that search side by side:\n")
        await _show_one(connection, console, seed)
        console.print("\nNow the same model under several strategies:\n")
        summaries: list[Summary] = []
        for row in ROWS:
            summaries.append(await _measure(connection, row, count or row.items, seed, summaries))
        console.print(table(summaries))
    console.print(f"[dim]{_LEGEND}[/dim]\n\n{_NEXT}\n[dim]{time.monotonic() - began:.0f} s in all[/dim]")


async def _show_one(connection: Connection, console: Console, seed: int) -> None:
    from orchestra.cli.run import usage_line
    from orchestra.cli.tree import thread_tree
    from orchestra.evaluation.tasks import load_task

    task = load_task("countdown", level="small", split="test")
    item = task.items(1)[0]
    outcome = await connection.run("spawn_join", item.prompt, seed=seed, extract=task.extract)
    console.print(thread_tree(outcome.graph, width=max(40, console.width - 28)), no_wrap=True, overflow="ellipsis")
    verdict = "[green]✓ correct[/green]" if task.grade(item, outcome.answer) else "[red]✗ wrong[/red]"
    console.print(f"{verdict} [dim]{usage_line(outcome.usage)}[/dim]")


async def _measure(connection: Connection, row: Row, count: int, seed: int, before: list[Summary]) -> Summary:
    from rich.console import Console

    from orchestra.evaluation.progress import EvaluationProgress
    from orchestra.evaluation.runner import evaluate
    from orchestra.evaluation.store import Plan, Record
    from orchestra.evaluation.summary import summarise
    from orchestra.evaluation.tasks import load_task

    task = load_task("countdown", level=row.level, split="test")
    budget = None
    if row.within:
        parallel = next(s for s in before if s.strategy == "spawn_join" and s.parameters["level"] == row.level)
        budget = f"critical_path_tokens={round(parallel.critical_path_tokens_p95 or 1)}"
    plan = Plan(
        task=task.name,
        parameters=dict(task.parameters),
        strategy=row.strategy,
        limit=count,
        seed=seed,
        max_tokens=_MOST_TOKENS,
        budget=budget,
    )
    records: list[Record] = []
    notes = Console(stderr=True, highlight=False)
    title = f"{row.level} · {row.strategy}" + (f" within {budget}" if budget else "")
    with EvaluationProgress(notes, title, count, lambda: connection.engine.load().sampled_tokens) as progress:

        def keep(record: Record) -> None:
            records.append(record)
            progress.add(record)

        await evaluate(connection, task, plan, keep)
    return summarise(plan, records)
