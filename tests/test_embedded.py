"""The shipped model does what its card says: a sample of the held-out problems, through the whole stack."""

from __future__ import annotations

import asyncio

import orchestra
from orchestra.evaluation.runner import evaluate
from orchestra.evaluation.store import Plan, Record
from orchestra.evaluation.summary import Summary, summarise
from orchestra.evaluation.tasks import load_task


def measure(level: str, strategy: str, limit: int, budget: str | None = None) -> Summary:
    task = load_task("countdown", level=level, split="test")
    plan = Plan(task="countdown", strategy=strategy, limit=limit, budget=budget, max_tokens=1500)
    records: list[Record] = []

    async def main() -> None:
        async with orchestra.connect() as connection:
            await evaluate(connection, task, plan, records.append)

    asyncio.run(main())
    return summarise(plan, records)


def test_spawn_join_solves_the_small_level_where_serial_search_runs_out_of_its_critical_path() -> None:
    """The card says over 95 % on 1,000; 36 of 40 is seven standard errors above what serial search gets there."""
    parallel = measure("small", "spawn_join", 40)
    assert (parallel.accuracy or 0) >= 36 / 40
    window = round(parallel.critical_path_tokens_p95 or 0)
    assert window < 500
    serial = measure("small", "sample", 40, f"critical_path_tokens={window}")
    assert (parallel.accuracy or 0) - (serial.accuracy or 0) > 0.3


def test_several_samples_beat_one_on_the_hard_level() -> None:
    """One sample stands between 40 and 80 %; the first of eight to finish is most often one that found something."""
    one = measure("hard", "sample(temperature=1)", 40)
    race = measure("hard", "first_finish(samples=8)", 40)
    assert 0.1 < (one.accuracy or 0) < 0.9
    assert (race.accuracy or 0) > (one.accuracy or 0)
