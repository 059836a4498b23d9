"""The evaluation loop: items x repeats, a bounded number at a time, over one engine."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Literal

from orchestra.concurrency import first_error
from orchestra.errors import EngineDown, EngineError, UsageError
from orchestra.evaluation.store import Key, Manifest, Plan, Record
from orchestra.evaluation.tasks import Item, Task
from orchestra.spec import parse_budget, parse_strategy

if TYPE_CHECKING:
    from orchestra.api import Connection
    from orchestra.outcome import Outcome
    from orchestra.runtime.engine import Engine

_VERSIONED = ("orchestra-lm", "torch", "transformers", "tokenizers", "pydantic")


def sample_seed(seed: int, item: str, repeat: int) -> int:
    """The seed of one sample: it depends on nothing but its arguments, so order and concurrency do not matter.

    It has 48 bits, which every engine and every reader of JSON takes unharmed.
    """
    digest = hashlib.sha256(f"{seed}/{repeat}/{item}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def manifest_of(plan: Plan, engine: Engine) -> Manifest:
    """The manifest of a run that starts now."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Manifest(plan=plan, facts=engine.facts(), versions=versions)


def _end_of(outcome: Outcome) -> Literal["stop", "length"]:
    """Whether a response is whole or was cut off: by a limit, or by a budget that ended its strategy."""
    cut = outcome.finish_reason in ("length", "cancelled") or (outcome.stopped_by and outcome.finish_reason != "stop")
    return "length" if cut else "stop"


async def evaluate(
    connection: Connection,
    task: Task,
    plan: Plan,
    on_record: Callable[[Record], None],
    *,
    items: list[Item] | None = None,
    skip: Container[Key] = (),
    concurrency: int = 32,
    on_outcome: Callable[[Record, Outcome], None] | None = None,
) -> None:
    """Run all samples of `plan` but those in `skip`; `on_record` gets each as it finishes.

    A sample whose engine fails becomes a record with an error. Whatever else goes wrong (a server that is gone for
    good, a prompt that the engine cannot take, a record that cannot be stored) ends the evaluation at once, cancels
    what runs, and is raised.

    Args:
        connection: an open connection.
        task: what `plan` names, loaded.
        plan: what to run.
        on_record: called on the event loop, between two steps of the program.
        items: the task's items, if they are at hand already.
        skip: samples that are stored already.
        concurrency: samples that run at a time; each may run many threads.
        on_outcome: called before `on_record` with all that is known of a sample that has not failed.

    Raises:
        OrchestraError: the first error that was not an engine's.
    """
    strategy = parse_strategy(plan.strategy)
    budget = parse_budget(plan.budget) if plan.budget else None
    if concurrency < 1 or plan.repeats < 1:
        raise UsageError(f"concurrency and repeats are at least 1, not {concurrency} and {plan.repeats}")
    chosen = task.items(plan.limit) if items is None else items

    # Repeat by repeat, so that a run that is stopped early has seen every item about equally often.
    waiting: Iterator[tuple[Item, int]] = (
        (item, repeat) for repeat in range(plan.repeats) for item in chosen if (item.id, repeat) not in skip
    )

    async def sample(item: Item, repeat: int) -> Record:
        seed = sample_seed(plan.seed, item.id, repeat)
        try:
            outcome = await connection.run(
                strategy,
                item.prompt,
                seed=seed,
                temperature=plan.temperature,
                top_p=plan.top_p,
                max_tokens=plan.max_tokens,
                budget=budget,
                extract=task.extract,
                item=f"{plan.task}/{item.id}",
                repeat=repeat,
            )
        except EngineDown:
            raise
        except EngineError as error:
            failure = " ".join(str(error).split())
            return Record(task=plan.task, id=item.id, repeat=repeat, seed=seed, error=failure)
        record = Record(
            task=plan.task,
            id=item.id,
            repeat=repeat,
            seed=seed,
            answer=outcome.answer,
            correct=task.grade(item, outcome.answer),
            text=outcome.text,
            finish_reason=_end_of(outcome),
            stopped_by=outcome.stopped_by,
            usage=outcome.usage,
        )
        if on_outcome is not None:
            on_outcome(record, outcome)
        return record

    async def work() -> None:
        for item, repeat in waiting:
            on_record(await sample(item, repeat))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(chosen) * plan.repeats)):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise first_error(errors) from errors
