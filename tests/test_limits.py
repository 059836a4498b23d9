"""What a client may ask of a server at once: values of the limits, the gate, and how long it waits."""

from __future__ import annotations

import asyncio
import math
import random
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.runtime.limits import Gate, Limits, backoff, retry_after

# -- values ------------------------------------------------------------------------------------------------------------


def test_limits_take_their_own_parameters_and_leave_the_others() -> None:
    parameters = {"concurrency": "7", "rate": "2.5", "retries": "0", "timeout": "1e2", "patience": "0", "model": "m"}
    assert Limits.take(parameters) == Limits(concurrency=7, rate=2.5, retries=0, timeout=100.0, patience=0.0)
    assert parameters == {"model": "m"}
    assert Limits.take({}) == Limits()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("concurrency", "0", "concurrency is at least 1, not 0"),
        ("concurrency", "-3", "concurrency is at least 1, not -3"),
        ("concurrency", "5.5", "concurrency = '5.5' is not a whole number"),
        ("concurrency", "nan", "concurrency = 'nan' is not a whole number"),
        ("concurrency", "", "concurrency = '' is not a whole number"),
        ("retries", "-1", "retries is at least 0, not -1"),
        ("rate", "-0.1", "rate is at least 0, not -0.1"),
        ("rate", "nan", "rate is at least 0, not nan"),
        ("rate", "ten", "rate = 'ten' is not a number"),
        ("timeout", "0", "timeout is at least 0.001, not 0"),
        ("timeout", "nan", "timeout is at least 0.001, not nan"),
        ("timeout", "-inf", "timeout is at least 0.001, not -inf"),
        ("patience", "-1", "patience is at least 0, not -1"),
        ("patience", "NaN", "patience is at least 0, not nan"),
    ],
)
def test_a_wrong_limit_is_named_with_its_range(name: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        Limits.take({name: text})
    assert message in str(error.value)


def test_no_more_slots_than_sockets() -> None:
    resource = pytest.importorskip("resource")
    most, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 512), hard))
    try:
        assert Limits(concurrency=10_000).slots() == min(most, 512) - 128
        assert Limits(concurrency=9).slots() == 9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_cancelled_waiters_lose_no_slot_and_take_none(seed: int) -> None:
    chance = random.Random(seed)
    slots = chance.randint(1, 4)

    async def main() -> None:
        gate = Gate(Limits(concurrency=slots))
        inside = most = done = 0

        async def work(steps: int) -> None:
            nonlocal inside, most, done
            async with gate:
                inside += 1
                most = max(most, inside)
                try:
                    await gate.ready()
                    for _ in range(steps):
                        await asyncio.sleep(0)
                finally:
                    inside -= 1
            done += 1

        tasks = [asyncio.create_task(work(chance.randint(0, 5))) for _ in range(200)]
        for _ in range(300):
            chance.choice(tasks).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.wait(tasks)
        assert 0 < done < 200
        assert (inside, gate.held) == (0, 0)
        # All slots are there again, and not one more.
        inside = most = 0
        async with asyncio.TaskGroup() as group:
            for _ in range(3 * slots):
                group.create_task(work(3))
        assert most == slots

    asyncio.run(asyncio.wait_for(main(), 20))


def test_waiters_pass_in_order() -> None:
    async def main() -> list[int]:
        gate, order = Gate(Limits(concurrency=2)), []

        async def work(index: int) -> None:
            async with gate:
                order.append(index)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for index in range(20):
                group.create_task(work(index))
        return order

    assert asyncio.run(main()) == list(range(20))


def test_the_rate_holds_over_every_stretch_of_time() -> None:
    """Of a rate r, a stretch of T seconds has at most r T requests, and one second's (or one request) more."""

    async def starts(rate: float, count: int) -> list[float]:
        gate, times = Gate(Limits(rate=rate)), []

        async def work() -> None:
            async with gate:
                await gate.ready()
                times.append(time.monotonic())

        await asyncio.gather(*(work() for _ in range(count)))
        return times

    async def main() -> None:
        cases = [(2.5, 5), (0.8, 2), (30.0, 45), (math.inf, 50), (0.0, 50)]
        for (rate, count), times in zip(cases, await asyncio.gather(*(starts(*case) for case in cases)), strict=True):
            assert len(times) == count
            assert times == sorted(times)
            if 0 < rate < math.inf:
                burst = max(1, round(rate))
                for i in range(count):
                    for j in range(i, count):
                        assert j - i + 1 <= rate * (times[j] - times[i]) + burst + 1e-6, (rate, i, j)

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("rate", [0.0, 3.0])
def test_a_pause_holds_everyone_and_a_shorter_one_does_not_end_it(rate: float) -> None:
    async def main() -> None:
        gate, times = Gate(Limits(rate=rate)), []
        if rate:
            for _ in range(3):  # what follows waits for the rate when the pause begins
                await gate.ready()

        async def work() -> None:
            async with gate:
                await gate.ready()
                times.append(time.monotonic())

        waiting = [asyncio.create_task(work()) for _ in range(2)] if rate else []
        await asyncio.sleep(0.01)
        began = time.monotonic()
        gate.pause(1.2 if rate else 0.2)
        gate.pause(0.01)
        waiting += [asyncio.create_task(work())]
        await asyncio.gather(*waiting)
        assert min(times) >= began + (1.2 if rate else 0.2)

    asyncio.run(asyncio.wait_for(main(), 20))


# -- waits -------------------------------------------------------------------------------------------------------------


def test_backoff_doubles_up_to_a_cap_and_is_jittered() -> None:
    for attempt, longest in [(1, 0.2), (2, 0.4), (3, 0.8), (5, 3.2), (6, 6.4), (7, 8.0), (20, 8.0), (10**9, 8.0)]:
        waits = [backoff(attempt) for _ in range(300)]
        assert all(longest / 2 <= wait <= longest for wait in waits)
        assert max(waits) - min(waits) > longest / 4, "without jitter all clients come back at once"


def test_retry_after_takes_seconds_and_dates() -> None:
    assert retry_after(None) is None
    assert [retry_after(text) for text in ("0", "7", "0.5", " 2 ", "1e1")] == [0.0, 7.0, 0.5, 2.0, 10.0]
    assert [retry_after(text) for text in ("-5", "nan", "inf", "-inf", "1e999")] == [0.0] * 5
    assert [retry_after(text) for text in ("", "soon", "Mon, 99 Foo 2020 00:00:00 GMT", "12 s")] == [None] * 4
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@pytest.mark.parametrize("zone", ["GMT", "+0000", "-0000", "+0530", ""])
def test_a_date_counts_from_now_whatever_its_zone(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        then = datetime.now(UTC) + timedelta(seconds=100)
        if zone == "+0530":
            then += timedelta(hours=5, minutes=30)
        seconds = retry_after(f"{then:%a, %d %b %Y %H:%M:%S} {zone}".strip())
    finally:
        monkeypatch.undo()
        time.tzset()
    assert seconds is not None
    assert 95 < seconds <= 100


@given(st.text() | st.dates().map(str) | st.datetimes().map(lambda t: format_datetime(t.replace(tzinfo=UTC))))
def test_nonsense_in_retry_after_is_never_an_error(text: str) -> None:
    seconds = retry_after(text)
    assert seconds is None or 0 <= seconds < math.inf
