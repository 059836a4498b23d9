"""The simulated clock: it jumps when nothing else can happen, and only then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest

import orchestra
from orchestra import Thread, strategy
from orchestra.graph import Span
from orchestra.runtime import clock as clocks
from orchestra.runtime.clock import REAL, SimulatedClock
from orchestra.runtime.engine import Delta, Engine, Prompt, Request, Stream
from orchestra.testing.scripted import ScriptedEngine, replies, words


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, 20))


async def sleep(clock: SimulatedClock, seconds: float) -> float:
    over = asyncio.Event()
    clock.call_at(clock.now() + seconds, over.set)
    await over.wait()
    return clock.now()


def test_events_come_in_order_of_time_then_of_last_then_of_sequence() -> None:
    async def main() -> None:
        clock = SimulatedClock()
        seen: list[tuple[str, float]] = []

        def note(name: str, when: float, **options: bool) -> None:
            clock.call_at(when, lambda: seen.append((name, clock.now())), **options)

        note("deadline", 2.0, last=True)
        note("b", 2.0)
        note("c", 2.0)
        note("a", 0.5)
        clock.call_at(1.0, lambda: seen.append(("never", 0))).cancel()
        clock.call_at(2.0, lambda: note("late, so at once", 1.0))
        assert await sleep(clock, 3.0) == 3.0
        assert seen == [("a", 0.5), ("b", 2.0), ("c", 2.0), ("late, so at once", 2.0), ("deadline", 2.0)]

    run(main())


def test_hours_take_no_time_and_nothing_is_left_behind() -> None:
    async def main() -> None:
        clock = SimulatedClock()
        before = asyncio.all_tasks()
        for _ in range(1000):
            await sleep(clock, 3600)
        assert clock.now() == 3_600_000
        assert asyncio.all_tasks() == before
        assert not clock._timers
        for _ in range(3):
            await asyncio.sleep(0)
        assert not clocks._Pump.here()._queued  # it does not spin when there is nothing to wait for

    began = time.monotonic()
    run(main())
    assert time.monotonic() - began < 5


def test_what_an_event_sets_off_comes_to_rest_before_the_next() -> None:
    async def main() -> None:
        clock = SimulatedClock()

        async def long_winded() -> float:
            await sleep(clock, 1)
            for _ in range(clocks._Pump.MOST_HOPS // 2):
                await asyncio.sleep(0)
            return clock.now()

        at, later = await asyncio.gather(long_winded(), sleep(clock, 1.25))
        assert (at, later) == (1, 1.25)

    run(main())


@pytest.mark.parametrize("ended", [1.0, 2.0])
def test_timeout_what_ends_at_the_deadline_is_in_time(ended: float) -> None:
    async def main() -> None:
        clock = SimulatedClock()
        async with clock.timeout(2) as timer:
            await sleep(clock, ended)
        assert not timer.expired()
        assert clock.now() == ended
        assert await sleep(clock, 10) == ended + 10  # the deadline is forgotten

    run(main())


def test_timeout_that_expires() -> None:
    async def main() -> None:
        clock = SimulatedClock()
        with pytest.raises(TimeoutError):
            async with clock.timeout(2) as timer:
                await sleep(clock, 2.5)
        assert timer.expired()
        assert clock.now() == 2
        with pytest.raises(TimeoutError):
            async with clock.timeout(5), clock.timeout(None), clock.timeout(7):
                await sleep(clock, 9)
        assert clock.now() == 7
        with pytest.raises(ZeroDivisionError):
            async with clock.timeout(2):
                raise ZeroDivisionError

    run(main())


def test_clocks_of_one_loop_are_independent_and_fair() -> None:
    async def main() -> None:
        first, second = SimulatedClock(), SimulatedClock()
        order: list[str] = []

        async def walk(name: str, clock: SimulatedClock, step: float) -> float:
            for _ in range(20):
                await sleep(clock, step)
                order.append(name)
            return clock.now()

        assert await asyncio.gather(walk("a", first, 1), walk("b", second, 1000)) == [20, 20_000]
        assert "".join(order) == "ab" * 20

    run(main())


def test_held_while_something_real_is_waited_for() -> None:
    async def main() -> None:
        clock, other = SimulatedClock(), SimulatedClock()

        async def really() -> float:
            with clock.held(), clock.held():
                await asyncio.sleep(0.02)
            return clock.now()

        waited, slept, free = await asyncio.gather(really(), sleep(clock, 5), sleep(other, 7))
        assert (waited, slept, free) == (0, 5, 7)

    run(main())


def test_a_program_that_polls_does_not_stop_the_time() -> None:
    async def main() -> None:
        clock = SimulatedClock()
        task = asyncio.create_task(sleep(clock, 3))
        while not task.done():  # noqa: ASYNC110 (that is the point)
            await asyncio.sleep(0)
        assert task.result() == 3

    run(main())


def test_an_event_that_fails_does_not_stop_the_time() -> None:
    async def main() -> None:
        errors: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context["exception"]))
        clock = SimulatedClock()
        clock.call_at(1, lambda: 1 // 0)  # type: ignore[arg-type, return-value]
        assert await sleep(clock, 2) == 2
        assert [type(error) for error in errors] == [ZeroDivisionError]

    run(main())


def _race() -> orchestra.Outcome:
    engine = ScriptedEngine(replies(*words([50, 6, 4, 80])))

    async def main() -> orchestra.Outcome:
        async with orchestra.connect(engine) as connection:
            runs = [connection.run("first_finish(samples=4, first=2)", "go") for _ in range(3)]
            outcome, *others = await asyncio.gather(*runs)
            assert all(other.usage == outcome.usage for other in others)
            return outcome

    return run(main())


def test_on_loops_that_do_not_tell_whether_they_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    known = _race()
    monkeypatch.setattr(clocks, "_waiting", lambda loop: None)
    blind = _race()
    assert blind.usage == known.usage
    # 6 of the second, 4 of the third; the first may still tie until its 7th, the fourth may not after its 6th.
    assert (blind.usage.sampled_tokens, blind.usage.wall_seconds) == (6 + 4 + 7 + 6, 7.0)


def test_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")
    engine = ScriptedEngine(replies(*words([50, 6, 4, 80])))

    async def main() -> orchestra.Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run("first_finish(samples=4, first=2)", "go", budget="wall_seconds=100")

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(asyncio.wait_for(main(), 20))
    assert (outcome.usage.sampled_tokens, outcome.usage.wall_seconds) == (6 + 4 + 7 + 6, 7.0)


def test_the_rate_of_the_scripted_engine() -> None:
    async def main() -> None:
        async with orchestra.connect(ScriptedEngine(replies(*words([7])), rate=4)) as connection:
            outcome = await connection.run("sample", "go")
            assert outcome.usage.wall_seconds == 7 / 4
            (node,) = [node for node in outcome.graph.nodes if node.started is not None]
            assert (node.started, node.ended) == (0, 7 / 4)

    run(main())


def test_the_time_of_another_real_engine_does_not_count() -> None:
    """A judge that really takes time: the samples beside it do not run ahead, the deadline does not come."""

    class Slow(Engine):
        async def encode_prompt(self, prompt: Prompt, **template: Any) -> Span:
            await asyncio.sleep(0.02)
            return Span("prompt", [], 1, "good?")

        async def encode(self, text: str) -> Span:
            return Span("forced")

        def generate(self, request: Request) -> Stream:
            stream = Stream(lambda: None)
            asyncio.get_running_loop().call_later(0.02, stream.push, Delta([1], 1, "yes", finish_reason="stop"))
            return stream

    @strategy
    async def judged(thread: Thread) -> Thread:
        beside = thread.fork(1)[0].start()
        verdict = await thread.spawn(["good?"], engine="judge")[0].generate()
        assert verdict.text == "yes"
        assert not beside.done()
        return await beside

    async def main() -> None:
        async with orchestra.connect(ScriptedEngine(replies(*words([5]))), {"judge": Slow()}) as connection:
            outcome = await connection.run(judged(), "go", budget="wall_seconds=5")
            assert outcome.stopped_by is None
            assert outcome.usage.wall_seconds == 5

    run(main())


def test_real_time() -> None:
    async def main() -> None:
        began = REAL.now()
        with pytest.raises(TimeoutError), REAL.held():
            async with REAL.timeout(0.01):
                await asyncio.sleep(5)
        assert 0.01 <= REAL.now() - began < 2

    run(main())
