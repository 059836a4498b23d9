"""Samples drawn as a group come out as if each had been drawn by itself, whatever happens to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.errors import EngineError
from orchestra.runtime.engine import Delta, Request, Stream
from orchestra.testing.scripted import Script, ScriptedEngine, replies

TEXTS = (" x x answer: 3 $", " answer: 4 $", " x x x x answer: 3 $", " answer: 4 x x $", " x answer: none $")


class Watched(ScriptedEngine):
    """Counts how it is asked."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.groups: list[int] = []

    def generate_group(self, requests: Sequence[Request]) -> list[Stream]:
        self.groups.append(len(requests))
        return super().generate_group(requests)


def run(spec: Any, texts: Sequence[str], *, watched: bool = False, **options: Any) -> tuple[Outcome, Watched]:
    """The outcome; `watched` by a listener, samples go one by one."""
    engine = Watched(replies(*texts))

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            if not watched:
                return await connection.run(spec, "go", **options)
            events = [event async for event in connection.stream(spec, "go", **options)]
            return events[-1].outcome

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens
    assert engine.load().requests == 0
    return outcome, engine


def plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome without its clock."""
    data = outcome.model_dump()
    data["usage"].pop("wall_seconds")
    for node in data["graph"]["nodes"]:
        assert (node.pop("started") is None) == (node.pop("ended") is None)
    return data


words = st.lists(st.sampled_from(["x", "answer:", "3", "4", "none"]), min_size=0, max_size=6)


@settings(max_examples=40)
@given(
    st.sampled_from(["self_consistency", "best_of", "best_of(scorer='logprob')"]),
    st.lists(words.map(lambda said: "".join(f" {word}" for word in said) + " $"), min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from([{}, {"max_tokens": 3}, {"max_tokens": 1}]),
)
def test_a_group_is_its_members_one_by_one(spec: str, texts: list[str], samples: int, options: dict[str, Any]) -> None:
    spec = f"{spec[:-1]}, samples={samples})" if "(" in spec else f"{spec}(samples={samples})"
    fast, together = run(spec, texts, **options)
    watched, one_by_one = run(spec, texts, watched=True, **options)
    budgeted, shared_out = run(spec, texts, budget="requests=1000", **options)
    assert together.groups == ([samples] if samples > 1 else [])
    assert one_by_one.groups == shared_out.groups == []
    assert plain(fast) == plain(watched) == plain(budgeted)
    fast.graph.check_integrity()


def test_a_group_inside_strategies_is_the_same() -> None:
    """What comes after a group comes after all of it, on the critical path too."""

    @strategy
    async def twice(thread: Thread) -> Thread:
        first = await thread.fork(3).generate()
        return await thread.join(first[:2], " so", how="recompute").generate()

    fast, engine = run(twice(), TEXTS)
    watched, _ = run(twice(), TEXTS, watched=True)
    assert engine.groups == [3]
    assert plain(fast) == plain(watched)
    longest = 6  # " x x x x answer: 3", of three forks the longest, then `so`'s answer
    assert fast.usage.critical_path_tokens > longest


def test_each_is_called_in_the_order_of_the_finish() -> None:
    orders = []

    @strategy
    async def watch(thread: Thread) -> Thread:
        order: list[tuple[int, str]] = []
        grown = await thread.fork(5).generate(each=lambda index, one: order.append((index, one.generated)))
        assert [one.generated for one in grown] == [text for _, text in sorted(order)]
        orders.append([index for index, _ in order])
        return grown[0]

    run(watch(), TEXTS)
    run(watch(), TEXTS, watched=True)
    assert orders == [[1, 4, 0, 3, 2]] * 2  # 2, 3, 4, 4 and 6 words


# -- errors ------------------------------------------------------------------------------------------------------------


class Failing(Watched):
    """Some members fail when they have said some words; cancelled ones end only after a while, as over a network."""

    def __init__(self, fail: dict[int, int], late: float = 0.01) -> None:
        super().__init__(replies(" w" * 50 + " $"))
        self.fail, self.late = fail, late
        self.cancelled: list[int] = []

    def _say(self, playing: Any) -> None:
        if playing.said != self.fail.get(playing.request.path[-1]):
            super()._say(playing)
            return
        for other in list(self._live):  # all at once, before anybody hears of the first
            index = other.request.path[-1]
            if self.fail.get(index) == playing.said:
                self._drop(other)
                other.stream.fail(EngineError(f"member {index} failed"))

    def _cancel(self, playing: Any) -> None:
        if playing in self._live:
            self._drop(playing)
            self.cancelled.append(playing.request.path[-1])
            last = Delta([0], 1, " late", [-1.0], finish_reason="cancelled")
            self._sampled += 1
            asyncio.get_running_loop().call_later(self.late, playing.stream.push, last)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("fail", [{2: 3}, {0: 4, 1: 4, 3: 4}, {0: 0, 1: 0, 2: 0, 3: 0, 4: 0}, {0: 2, 4: 3}])
def test_an_error_of_one_cancels_the_others_and_is_raised_once(fail: dict[int, int], watched: bool) -> None:
    engine = Failing(fail)
    graphs = []

    @strategy
    async def five(thread: Thread) -> Thread:
        graphs.append(thread._run.graph)
        return (await thread.fork(5).generate())[0]

    async def main() -> None:
        async with orchestra.connect(engine) as connection:
            if watched:
                _ = [event async for event in connection.stream(five(), "go")]
            else:
                await connection.run(five(), "go")

    with pytest.raises(EngineError, match=rf"^member {min(fail, key=lambda i: (fail[i], i))} failed$"):
        asyncio.run(asyncio.wait_for(main(), 5))
    at_once = [index for index in fail if fail[index] == min(fail.values())]
    assert sorted(engine.cancelled) == [index for index in range(5) if index not in at_once]
    # All that was decoded is in the graph, after the error too; slow or fast.
    assert graphs[0].count("sampled") == engine.load().sampled_tokens
    for node in graphs[0].nodes[1:]:
        expected = {"error"} if node.path[-1] in at_once else {"cancelled"}
        assert {node.finish_reason} == expected
        assert node.ended is not None


@pytest.mark.parametrize("cancels", [1, 3])
def test_cancellation_keeps_what_was_decoded(cancels: int) -> None:
    engine = Failing({}, late=0.1)
    graphs = []

    @strategy
    async def four(thread: Thread) -> Thread:
        graphs.append(thread._run.graph)
        return (await thread.fork(4).generate())[0]

    async def main() -> None:
        async with orchestra.connect(engine) as connection:
            task = asyncio.create_task(connection.run(four(), "go"))
            while engine.load().sampled_tokens < 12:  # noqa: ASYNC110 (the engine has no event for it)
                await asyncio.sleep(0)
            for _ in range(cancels):  # again while it waits for the rest
                task.cancel()
                await asyncio.sleep(0.01)
            await asyncio.wait([task])
            assert task.cancelled()

    asyncio.run(asyncio.wait_for(main(), 5))
    assert sorted(engine.cancelled) == [0, 1, 2, 3]
    assert graphs[0].count("sampled") == engine.load().sampled_tokens
    assert [node.text[-5:] for node in graphs[0].nodes[1:]] == [" late"] * 4
    assert {node.finish_reason for node in graphs[0].nodes[1:]} == {"cancelled"}


@pytest.mark.parametrize("watched", [False, True])
def test_an_error_in_each_ends_the_group(watched: bool) -> None:
    @strategy
    async def wrong(thread: Thread) -> Thread:
        def each(index: int, _: Thread) -> None:
            raise KeyError(index)

        return (await thread.fork(5).generate(each=each))[0]

    with pytest.raises(KeyError, match="1"):
        run(wrong(), TEXTS, watched=watched)


@pytest.mark.parametrize("watched", [False, True])
def test_members_that_the_engine_ends_are_members_still(watched: bool) -> None:
    """An engine that is closed under a run ends its streams as cancelled; nobody here asked for that."""

    class Closing(Watched):
        def _next(self, playing: Any) -> Delta:
            delta = super()._next(playing)
            if playing.request.path[-1] == 1 and playing.said == 2:
                delta.finish_reason = "cancelled"
            return delta

    engine = Closing(replies(*TEXTS))

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            if not watched:
                return await connection.run("self_consistency(samples=3)", "go")
            return [event async for event in connection.stream("self_consistency(samples=3)", "go")][-1].outcome

    outcome = asyncio.run(asyncio.wait_for(main(), 5))
    assert [candidate.finish_reason for candidate in outcome.candidates] == ["stop", "cancelled", "stop"]
    assert outcome.answer == "3"


@pytest.mark.parametrize("watched", [False, True])
def test_a_budget_of_time_gives_the_best_offered_so_far(watched: bool) -> None:
    class Slow(Failing):
        """Members 0 and 2 end after three seconds, the others after fifty."""

        def _next(self, playing: Any) -> Delta:
            delta = super()._next(playing)
            index = playing.request.path[-1]
            if index in (0, 2) and playing.said == 3:
                delta.text, delta.finish_reason = f" answer: {index}", "stop"
            return delta

    engine = Slow({})

    async def main() -> Outcome:
        options = {"budget": "wall_seconds=10.5"}
        async with orchestra.connect(engine) as connection:
            if not watched:
                return await connection.run("self_consistency(samples=4)", "go", **options)
            return [e async for e in connection.stream("self_consistency(samples=4)", "go", **options)][-1].outcome

    outcome = asyncio.run(asyncio.wait_for(main(), 10))
    assert outcome.usage.wall_seconds == 10.5
    assert outcome.stopped_by == "wall_seconds"
    assert [candidate.answer for candidate in outcome.candidates] == ["0", "2"]
    assert outcome.answer == "0"
    assert sorted(engine.cancelled) == [1, 3]
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens
