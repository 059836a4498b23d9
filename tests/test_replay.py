"""Replayed samples: how long they take, what budgets leave of them, and whose they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from recordings import RATE, at_rest, charged, line, recorder, run, write

import orchestra
from orchestra import Outcome, Thread, ThreadGraph, strategy
from orchestra.errors import UsageError
from orchestra.runtime.connect import open_engine
from orchestra.runtime.replay import ReplayEngine
from orchestra.testing import ScriptedEngine, check_strategy
from orchestra.testing.scripted import replies


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., ReplayEngine]:
    return recorder(tmp_path)


def test_time_takes_the_tokens_at_the_rate(engine: Any) -> None:
    outcome = run(engine(100, rate=50), "sample")
    assert outcome.usage.model_dump() == {
        "prompt_tokens": 1, "cached_tokens": 0, "forced_tokens": 0, "sampled_tokens": 100, "critical_path_tokens": 100,
        "sequential_tokens": 101, "total_tokens": 101,
        "requests": 1, "wall_seconds": 2.0,
    }  # fmt: skip
    (node,) = [node for node in outcome.graph.nodes if node.started is not None]
    assert (node.started, node.ended, node.finish_reason) == (0.0, 2.0, "stop")


def test_max_tokens_cuts_the_text_in_proportion_and_forgets_the_answer(engine: Any) -> None:
    replay = engine(10, answers=["9"], text="answer: 12 and so on", finish_reason="length", confidence=0.5)
    whole = run(replay, "sample", max_tokens=10)
    assert (whole.text, whole.answer, whole.finish_reason) == ("answer: 12 and so on", "9", "length")
    cut = run(replay, "sample", max_tokens=5)
    assert (cut.text, cut.answer, cut.finish_reason) == ("answer: 12", "12", "length")
    assert (cut.usage.sampled_tokens, cut.usage.wall_seconds) == (5, 5 / RATE)
    assert all(not node.notes for node in cut.graph.nodes)


def test_the_budget_of_tokens_is_used_to_its_end(engine: Any) -> None:
    outcome = run(engine(10, 10, 10, rate=1), "self_consistency(samples=3)", budget="sampled_tokens=25")
    assert charged(outcome) == [10, 10, 5]
    assert (outcome.stopped_by, outcome.answer, outcome.usage.wall_seconds) == ("sampled_tokens", "0", 25)
    side = run(engine(10, 10, 10, rate=1), "self_consistency(samples=3)", budget="sampled_tokens=25", max_tokens=12)
    assert charged(side) == [10, 10, 5]
    # Two reserve 12 each; the third gets the 1 + 2 + 2 that are left when they end.
    assert side.usage.wall_seconds == 15


def test_the_budget_of_the_critical_path_cuts_each_sample(engine: Any) -> None:
    outcome = run(engine(10, 30, 20), "self_consistency(samples=3)", budget="critical_path_tokens=20")
    assert charged(outcome) == [10, 20, 20]
    assert (outcome.stopped_by, len(outcome.candidates)) == ("critical_path_tokens", 2)
    assert outcome.usage.wall_seconds == 20 / RATE


def test_the_budget_of_seconds_cancels_at_that_moment(engine: Any) -> None:
    outcome = run(engine(10, 30, 20, rate=10), "self_consistency(samples=3)", budget="wall_seconds=2.09")
    assert charged(outcome) == [10, 20, 20]
    assert [n.finish_reason for n in outcome.graph.nodes if n.started is not None] == ["stop", "cancelled", "stop"]
    assert (outcome.stopped_by, outcome.usage.wall_seconds) == ("wall_seconds", 2.09)


def test_cancelled_between_two_tokens_and_nothing_is_left(engine: Any) -> None:
    replay = engine(100, 200, rate=10)
    graphs: list[ThreadGraph] = []

    @strategy
    async def stopped(thread: Thread) -> Any:
        graphs.append(thread._run.graph)
        task = asyncio.current_task()
        thread._run.clock.call_at(3.55, lambda: task and task.cancel())  # type: ignore[attr-defined]
        return await thread.fork(2).race()

    with pytest.raises(asyncio.CancelledError):
        run(replay, stopped())
    at_rest(replay)
    assert [n.count("sampled") for n in graphs[0].nodes if n.started is not None] == [35, 35]
    assert [n.text for n in graphs[0].nodes if n.started is not None] == ["x" * 35, "x" * 35]
    assert replay.load().sampled_tokens == 70


def test_a_sample_of_no_tokens(engine: Any) -> None:
    outcome = run(engine(0, 5, answers=[None, "5"]), "first_finish(samples=2)")
    assert (outcome.text, outcome.answer, outcome.usage.wall_seconds) == ("", None, 0)


@pytest.mark.parametrize(
    "spec",
    ["sample", "self_consistency(samples=4)", "first_finish(samples=4)", "first_finish(samples=4, first=2, by='time')"],
)
def test_the_laws_of_strategies(engine: Any, spec: str) -> None:
    async def main() -> None:
        replay = engine(9, 5, 7, 300)
        await asyncio.wait_for(check_strategy(replay, spec, "go", item="sums/a"), 60)
        at_rest(replay)

    asyncio.run(main())


def test_runs_side_by_side_are_as_alone(engine: Any) -> None:
    replay = engine(30, 12, 400, 20)
    alone = run(replay, "first_finish(samples=4)")

    async def main() -> list[Outcome]:
        async with orchestra.connect(replay) as connection:
            return await asyncio.gather(*(connection.run("first_finish(samples=4)", "go") for _ in range(50)))

    assert all(outcome.model_dump() == alone.model_dump() for outcome in asyncio.run(main()))
    at_rest(replay)


def test_without_a_fork_it_is_the_runs_own_repeat(engine: Any) -> None:
    replay = engine(3, 5, 7)
    assert [run(replay, "sample", repeat=k).usage.sampled_tokens for k in range(3)] == [3, 5, 7]
    assert run(replay, "sample").usage.sampled_tokens == 3


def test_items_are_found_by_name_and_by_task(tmp_path: Path) -> None:
    lines = [line(0, n, task=task, id=item) for n, (task, item) in enumerate(
        [("sums", "a"), ("sums", "b/1"), ("products", "a"), ("sums", "products/a")], 3)]  # fmt: skip
    replay = ReplayEngine(write(tmp_path / "r.jsonl", lines))
    for item, tokens in {"sums/a": 3, "b/1": 4, "sums/b/1": 4, "sums/products/a": 6}.items():
        assert run(replay, "sample", item=item).usage.sampled_tokens == tokens
    with pytest.raises(UsageError, match=r"item 'a' is in 2 tasks of r.jsonl; say which: sums/a, products/a"):
        run(replay, "sample", item="a")
    with pytest.raises(UsageError, match="item 'products/a' is in 2 tasks"):
        run(replay, "sample", item="products/a")
    with pytest.raises(UsageError, match="no samples of item 'sums/b', only of 4 such as 'sums/b/1'"):
        run(replay, "sample", item="sums/b")
    with pytest.raises(UsageError, match=r"samples of 4 items: say whose .*orchestra eval"):
        run(replay, "sample")


def test_what_was_recorded_besides_the_text(engine: Any) -> None:
    replay = engine(4, answers=["12"], text="so 13", thinking_tokens=3, confidence=0.25, prompt_tokens=17, extra=[1])
    outcome = run(replay, "self_consistency(samples=1)")
    assert (outcome.answer, outcome.usage.prompt_tokens) == ("12", 17)
    assert outcome.graph.nodes[-1].notes == {"answer": "12", "thinking_tokens": 3, "confidence": 0.25}
    assert run(engine(4, answers=[None], text="so 13"), "sample").answer == "13"
    assert run(engine(4, answers=[None], text="so 13"), "sample", extract=lambda text: text[:2]).answer == "so"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1 + 1?"}]
    assert run(replay, "sample", messages).graph.nodes[0].text == "be brief\n1 + 1?"
    assert run(engine(4), "sample", messages).usage.prompt_tokens == 5  # no more is known than its words


def test_facts_and_url(engine: Any, tmp_path: Path) -> None:
    engine(4, 5)
    replay = open_engine(f"replay:{tmp_path / 'samples.jsonl'}?rate=12.5")
    facts = replay.facts()
    assert len(facts.pop("fingerprint")) == 64
    assert facts == {"engine": "replay", "file": "samples.jsonl", "rate": 12.5, "records": 2, "items": 1}
    assert replay.name == "replay:samples.jsonl"
    assert str(tmp_path) not in json.dumps(replay.facts())


def test_as_an_alias_beside_another_engine(engine: Any) -> None:
    """The run lives by its own engine's clock, which stands still while the other's goes on."""
    replay = engine(300, 200)

    @strategy
    async def both(thread: Thread) -> Thread:
        beside = thread.fork(1)[0].start()
        drafts = await thread.spawn([thread.prompt], engine="bank").generate()
        assert not beside.done()
        await beside
        return drafts[0]

    async def main() -> None:
        scripted = ScriptedEngine(replies(" x y $"))
        async with orchestra.connect(scripted, {"bank": replay}) as connection:
            outcome = await connection.run(both(), "go", budget="wall_seconds=3")
            assert outcome.stopped_by is None
            assert (outcome.answer, outcome.usage.wall_seconds) == ("1", 3.0)  # fork 0 was the other's
            assert scripted.load().requests == 0
            assert not scripted._clocks
        at_rest(replay)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_live_view_sees_the_end_of_each_sample(engine: Any) -> None:
    async def main() -> None:
        replay = engine(30, 12, 400, text="abcdefghijkl")
        async with orchestra.connect(replay) as connection:
            events = [event async for event in connection.stream("first_finish(samples=3)", "go")]
            told = {k: "".join(e.text for e in events if e.kind == "token" and e.path == (k,)) for k in range(3)}
            assert told == {0: "abcde", 1: "abcdefghijkl", 2: ""}  # in proportion: 13 of 30, all, 12 of 400
            async with aclosing(connection.stream("first_finish(samples=3)", "go")) as stream:
                assert (await anext(stream)).kind == "start"
                assert replay.load().requests > 0  # and leaving it here cancels the run
        at_rest(replay)

    asyncio.run(main())
