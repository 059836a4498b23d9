"""Structured concurrency for groups of threads: work that must finish, members side by side, races."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Finish `work` even if this task is cancelled meanwhile; the cancellation is raised after it."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return task.result()


def first_error(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error inside an exception group: what the caller of a group wants to see."""
    for error in errors.exceptions:
        return first_error(error) if isinstance(error, BaseExceptionGroup) else error
    return errors
