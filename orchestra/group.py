"""Work side by side: members of a group, races, and futures for what runs in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from orchestra.concurrency import first_error
from orchestra.errors import BudgetExceeded, UsageError
from orchestra.run import Run, Scope, current_scope, frontier, scope

T = TypeVar("T")


@dataclass
class Ended(Generic[T]):
    """How a member ended: with a value, or by a budget; and what it came after."""

    after: frozenset[int]
    value: list[T]  # one value, or none
    spent: BudgetExceeded | None = None


async def member_of(work: Coroutine[Any, Any, T]) -> Ended[T]:
    """Run `work` to its end; a budget that ends it is a result, which whoever waits for it raises."""
    try:
        value = await work
    except BudgetExceeded as spent:
        return Ended(frontier.get(), [], spent)
    return Ended(frontier.get(), [value])


async def gather(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run the members side by side and come after all of them.

    A budget that ends for one member does not cut the others short (what they may use is reserved already): it is
    raised when all have ended. Any other error cancels the others at once and is raised by itself.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(member_of(member)) for member in work]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    ended = [task.result() for task in tasks]
    if ended:
        frontier.set(frozenset().union(*(member.after for member in ended)))
    for member in ended:
        if member.spent is not None:
            raise member.spent
    return [value for member in ended for value in member.value]


async def first_value(work: Sequence[Coroutine[Any, Any, T | None]]) -> T | None:
    """The value of the first member that has one; the others are cancelled. None if all have ended without.

    The caller comes after that member, or after all. A budget that ended a member is raised if nobody has a value.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = {group.create_task(member_of(member)): None for member in work}
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    if task in done and not task.cancelled() and not task.exception():
                        ended = task.result()
                        if ended.value and ended.value[0] is not None:
                            for other in pending:
                                other.cancel()
                            frontier.set(ended.after)
                            return ended.value[0]
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    results = [task.result() for task in tasks]
    frontier.set(frozenset().union(*(ended.after for ended in results)))
    for ended in results:
        if ended.spent is not None:
            raise ended.spent
    return None


async def race(
    run: Run, work: Sequence[Coroutine[Any, Any, T]], first: int, by: Literal["time", "tokens"]
) -> list[tuple[int, T]]:
    """The `first` members to end, as (index, value) in the order of the finish; the others are cancelled.

    By `tokens` the clock of a member is its critical path, so the result does not depend on the schedule: a member is
    cancelled only when it can no longer win, and ties go to the lower index. The caller comes after the winners only.
    A member that its budget cut short did not finish; if too few do, that budget is raised.

    Raises:
        UsageError: fewer members than `first`.
    """
    if not 1 <= first <= len(work):
        for member in work:
            member.close()
        raise UsageError(f"a race of {len(work)} can have 1 to {len(work)} winners, not {first}")
    parent = scope()
    scopes = [Scope(run, parent, offers=parent.offers) for _ in work]
    ended: dict[int, Ended[T]] = {}
    changed = asyncio.Event()
    if by == "tokens":  # a member may lose by going on, not only when another ends
        for member_scope in scopes:
            member_scope.on_progress = changed.set

    def rank(index: int) -> tuple[int, int]:
        return (scopes[index].critical_path_tokens, index) if by == "tokens" else (0, 0)

    def podium() -> list[int]:
        finished = [index for index, end in ended.items() if end.spent is None]
        return sorted(finished, key=rank)[:first]  # sorted is stable: by time it keeps the order of the finish

    async def compete(index: int, member: Coroutine[Any, Any, T]) -> None:
        current_scope.set(scopes[index])
        ended[index] = await member_of(member)
        changed.set()

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(compete(index, member)) for index, member in enumerate(work)]
            running = set(range(len(tasks)))
            while running:
                await changed.wait()
                changed.clear()
                running -= ended.keys()
                winners = podium()
                if len(winners) < first:
                    continue
                for index in [i for i in running if by == "time" or rank(i) > rank(winners[-1])]:
                    tasks[index].cancel()
                    running.discard(index)
    except BaseExceptionGroup as errors:
        raise first_error(errors) from None
    winners = podium()
    frontier.set(frozenset().union(frontier.get(), *(ended[index].after for index in winners)))
    if len(winners) < first:
        raise next(end.spent for end in ended.values() if end.spent is not None)
    return [(index, ended[index].value[0]) for index in winners]


class Future(Awaitable[T], Generic[T]):
    """What `start()` gives: await it for the result."""

    def __init__(self, task: asyncio.Task[Ended[T]]) -> None:
        self._task = task

    def done(self) -> bool:
        """Whether it has ended."""
        return self._task.done()

    def cancel(self) -> None:
        """Stop it, on the server too."""
        self._task.cancel()

    async def stop(self) -> None:
        """Cancel it and wait until it has ended; what it has sampled by then is in the graph."""
        self._task.cancel()
        await asyncio.wait([self._task])

    def __await__(self) -> Generator[Any, None, T]:
        ended = yield from self._task.__await__()
        frontier.set(frontier.get() | ended.after)
        if ended.spent is not None:
            raise ended.spent
        return ended.value[0]
