"""Live progress of an evaluation: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn

from orchestra.evaluation.report import percent
from orchestra.evaluation.statistics import ClusteredMean
from orchestra.evaluation.store import Record

EVERY = 10.0
"""Seconds between two lines where there is no terminal."""

_WIDE = 100
"""Narrower terminals have no room for a bar beside the numbers."""


class EvaluationProgress:
    """Done and total, accuracy so far with its error, tokens a second, time to go, failures.

    Args:
        console: where to show it.
        title: what is running.
        total: samples in all.
        tokens: tokens that the engine has sampled so far, the unfinished samples' included.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(
        self, console: Console, title: str, total: int, tokens: Callable[[], int], *, every: float = EVERY
    ) -> None:
        self._console = console
        self._title = title
        self._total = total
        self._tokens = tokens
        self._every = every
        self._accuracy = ClusteredMean()
        self._failed = self._done = self._stored = 0
        self._began = self._said = time.monotonic()
        self._last = -1  # how many were done at the last line
        self._first = tokens()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began = self._said = time.monotonic()
        self._first = self._tokens()
        if self._console.is_terminal:
            columns: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn()]
            columns.append(TextColumn("{task.fields[status]}"))
            room = self._console.width - 52  # what the numbers leave
            if self._console.width >= _WIDE:
                columns.insert(2, BarColumn(bar_width=20))
                room -= 22
            self._bar = Progress(*columns, console=self._console, transient=True)
            title = self._title if len(self._title) <= room else self._title[: max(room - 1, 0)] + "…"
            self._task = self._bar.add_task(escape(title), total=self._total, completed=self._stored, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None and self._last != self._stored + self._done:
            self._say()

    def stored(self, record: Record) -> None:
        """Count a sample that an earlier process finished."""
        self._stored += 1
        self._grade(record)

    def add(self, record: Record) -> None:
        """Count a sample that finished now."""
        self._done += 1
        self._grade(record)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._stored + self._done, status=self.status())
        elif time.monotonic() - self._said >= self._every:
            self._say()

    def status(self) -> str:
        """Accuracy so far, speed, time to go and failures, in a few words."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        mean, stderr = self._accuracy.estimate
        parts = []
        if mean == mean:  # not nan: something was graded
            parts.append(percent(mean, stderr if stderr == stderr else None))
        parts.append(f"{(self._tokens() - self._first) / elapsed:,.0f} tokens/s")
        left = self._total - self._stored - self._done
        if self._done and left:
            parts.append(f"{_clock(left * elapsed / self._done)} left")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return " · ".join(parts)

    def _grade(self, record: Record) -> None:
        self._failed += record.failed
        if record.correct is not None:
            self._accuracy.add(record.id, float(record.correct))

    def _say(self) -> None:
        self._said = time.monotonic()
        self._last = done = self._stored + self._done
        line = f"{self._title}: {done}/{self._total} · {self.status()}"
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
