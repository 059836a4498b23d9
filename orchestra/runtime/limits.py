"""What a client may ask of a server at once, how often it tries again, and for how long it waits."""

from __future__ import annotations

import asyncio
import email.utils
import math
import random
import time
from dataclasses import dataclass, fields
from datetime import UTC
from types import TracebackType
from typing import Any

from orchestra.errors import UsageError

_FIRST_DELAY, _LONGEST_DELAY = 0.2, 8.0


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one engine; every field is a query parameter of its URL.

    Attributes:
        concurrency: requests in flight at a time; others wait in order.
        rate: requests begun per second, on average over a second or a request; 0 is no limit.
        retries: how often one request is tried again after a fault (429, 5xx, a broken or silent connection, a
            damaged answer). Failing to reach the server at all does not count: see `patience`.
        timeout: seconds of silence, not of work, after which a connection counts as broken. It starts anew with every
            byte; a generation that streams for an hour is not silent. Above the longest queue of the server.
        patience: seconds for which a server may be out of reach (a restart) before the engine is given up.
    """

    concurrency: int = 1024
    rate: float = 0.0
    retries: int = 10
    timeout: float = 300.0
    patience: float = 120.0

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("rate", 0), ("retries", 0), ("timeout", 0.001), ("patience", 0)):
            value = getattr(self, name)
            if not value >= least:  # also refuses NaN
                raise UsageError(f"engine parameter {name} is at least {least:g}, not {value}")

    @classmethod
    def take(cls, parameters: dict[str, str]) -> Limits:
        """Remove the limits from a URL's parameters.

        Raises:
            UsageError: a value that is not a number, or out of range.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            if (text := parameters.pop(field.name, None)) is not None:
                whole = isinstance(field.default, int)
                try:
                    values[field.name] = int(text) if whole else float(text)
                except ValueError:
                    kind = "whole number" if whole else "number"
                    raise UsageError(f"engine parameter {field.name} = {text!r} is not a {kind}") from None
        return cls(**values)

    def slots(self) -> int:
        """`concurrency`, or as many sockets as the process may open besides its other files."""
        try:
            import resource
        except ImportError:  # Windows
            return self.concurrency
        most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.concurrency if most == resource.RLIM_INFINITY else max(1, min(self.concurrency, most - 128))


class Gate:
    """Lets requests through: so many at a time, so many a second, none while the server has asked for a pause.

    `async with gate:` holds a slot. A waiter that is cancelled takes none with it.
    """

    def __init__(self, limits: Limits) -> None:
        self._slots = asyncio.Semaphore(limits.slots())
        self._throttle: Any = None
        if 0 < limits.rate < math.inf:
            from asyncio_throttle import Throttler

            # A rate below one a second is one request in a longer period.
            self._throttle = Throttler(max(1, round(limits.rate)), period=max(1.0, round(limits.rate)) / limits.rate)
        self._closed_until = 0.0
        self.held = 0

    def pause(self, seconds: float) -> None:
        """Let nothing through for a while."""
        self._closed_until = max(self._closed_until, time.monotonic() + seconds)

    async def ready(self) -> None:
        """Wait until another request may begin; for those that hold a slot."""
        await self._open()
        if self._throttle is not None:
            await self._throttle.acquire()
            await self._open()  # a pause may have begun meanwhile

    async def _open(self) -> None:
        while (wait := self._closed_until - time.monotonic()) > 0:  # noqa: ASYNC110 (it is a time, not an event)
            await asyncio.sleep(wait)

    async def __aenter__(self) -> None:
        await self._slots.acquire()
        self.held += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.held -= 1
        self._slots.release()


def backoff(attempt: int) -> float:
    """Seconds to wait before try number `attempt` (from 1): doubled each time, jittered so that clients spread out."""
    return min(_LONGEST_DELAY, _FIRST_DELAY * 2.0 ** min(attempt - 1, 16)) * random.uniform(0.5, 1.0)


def retry_after(header: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for: a number or an HTTP date; None if it is neither."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(header)
            seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if 0 <= seconds < math.inf else 0.0
