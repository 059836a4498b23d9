"""Races of replayed samples: who wins, what the losers are charged and how long it takes, all counted by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import RATE, at_rest, charged, line, passed, recorder, run, write

from orchestra import Outcome, Thread, ThreadGraph, strategy
from orchestra.graph import Edge
from orchestra.runtime.engine import Request, Sampling
from orchestra.runtime.replay import ReplayEngine


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., ReplayEngine]:
    return recorder(tmp_path)


def test_the_first_to_finish_wins_and_the_losers_are_charged_what_they_had(engine: Any) -> None:
    """By tokens a member before the winner may still tie until it has one token more; one after it may not."""
    outcome = run(engine(30, 12, 400, 20), "first_finish(samples=4)")
    assert (outcome.answer, outcome.text) == ("1", "x" * 12)
    assert charged(outcome) == [13, 12, 12, 12]
    assert outcome.usage.critical_path_tokens == 12
    assert outcome.usage.wall_seconds == 13 / RATE
    assert outcome.usage.requests == 4
    by_time = run(engine(30, 12, 400, 20), "first_finish(samples=4, by='time')")
    assert by_time.answer == "1"
    assert charged(by_time) == [12, 12, 12, 12]
    assert by_time.usage.wall_seconds == 12 / RATE


def test_a_member_that_can_no_longer_win_may_end_at_that_very_token(engine: Any) -> None:
    outcome = run(engine(13, 12, 12), "first_finish(samples=3)")
    assert charged(outcome) == [13, 12, 12]
    assert [n.finish_reason for n in outcome.graph.nodes if n.started is not None] == ["stop", "stop", "cancelled"]
    assert (outcome.answer, outcome.usage.wall_seconds) == ("1", 13 / RATE)


def test_ties_go_to_the_lower_index(engine: Any) -> None:
    for by in ("tokens", "time"):
        outcome = run(engine(20, 15, 15, 15), f"first_finish(samples=4, by='{by}')")
        assert outcome.answer == "1"
        assert charged(outcome) == [16 if by == "tokens" else 15, 15, 15, 15]


@pytest.mark.parametrize(
    ("first", "answer", "path"), [(1, "5", 4), (2, "5", 6), (3, "5", 9), (4, "5", 9), (5, "8", 30)]
)
def test_first_k_votes_over_the_first_k(engine: Any, first: int, answer: str, path: int) -> None:
    """In the order of the finish: 5, 8, 5, 3 and 8; of the first two the earlier one wins, of all five as well."""
    answers = ["8", "5", "5", "3", "8"]
    outcome = run(engine(30, 9, 4, 9, 6, answers=answers), f"first_finish(samples=5, first={first})")
    assert outcome.answer == {5: "5"}.get(first, answer)
    assert len(outcome.candidates) == first
    assert outcome.usage.critical_path_tokens == path


def test_the_order_of_arrival_does_not_matter(engine: Any) -> None:
    @strategy
    async def mixed(thread: Thread, order: list[int]) -> Outcome:
        async def late(branch: Thread) -> Thread:
            for _ in range(7 * order.index(branch.path[-1])):
                await asyncio.sleep(0)
            return await branch.generate()

        winners = await thread.fork(4).race(first=2, work=late)
        assert [w.path for w in winners] == [(2,), (1,)]
        assert [w.answer for w in winners] == ["2", "1"]
        return Outcome(text=winners[0].text)

    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        outcome = run(engine(30, 12, 9, 12), mixed(order=order))
        assert charged(outcome) == [13, 12, 9, 12]
        assert outcome.usage.wall_seconds == 13 / RATE


def test_a_staggered_race_is_decided_at_the_token_that_decides_it(engine: Any) -> None:
    """A budget of tokens without `max_tokens` lets one sample run after the other: each is as far as its own clock."""
    outcome = run(engine(20, 50, 15, 40, rate=1), "first_finish(samples=4)", budget="sampled_tokens=1000")
    # 0 ends with 20; 1 is out when it has 20 too; 2 wins with 15; 3 is out at 15.
    assert charged(outcome) == [20, 20, 15, 15]
    assert (outcome.answer, outcome.usage.wall_seconds) == ("2", 20 + 20 + 15 + 15)


def test_members_that_begin_at_different_times_are_out_at_their_own_token(engine: Any) -> None:
    @strategy
    async def staggered(thread: Thread) -> Thread:
        async def work(branch: Thread) -> Thread:
            await passed(thread, [0, 8, 3][branch.path[-1]])
            return await branch.generate()

        (winner,) = await thread.fork(3).race(work=work)
        return winner

    outcome = run(engine(10, 30, 30, rate=1), staggered())
    # When the first ends the others have 2 and 7 tokens; each goes on until it has 10 as well, the second until 18.
    assert charged(outcome) == [10, 10, 10]
    assert [node.ended for node in outcome.graph.nodes if node.started is not None] == [10, 13, 18]
    assert (outcome.answer, outcome.usage.wall_seconds) == ("0", 18)


def test_what_a_member_waited_for_counts_in_the_race(engine: Any) -> None:
    @strategy
    async def waiting(thread: Thread) -> Thread:
        before = thread.fork(1)[0].start()

        async def work(branch: Thread) -> Thread:
            if branch.path == (1,):
                await before
            elif branch.path == (3,):
                await passed(thread, 8)
            return await branch.generate()

        (winner,) = await thread.fork(3).race(work=work)
        return winner

    outcome = run(engine(9, 30, 10, 30, rate=1), waiting())
    # 9 + 2 is the first length with which fork 1 can no longer tie with the 10 of fork 2; fork 3 began at 8.
    assert charged(outcome) == [9, 2, 10, 10]
    ended = {tuple(node.path): node.ended for node in outcome.graph.nodes if node.started is not None}
    assert ended == {(0,): 9, (1,): 11, (2,): 10, (3,): 18}
    assert (outcome.answer, outcome.usage.critical_path_tokens, outcome.usage.wall_seconds) == ("2", 10, 18)


def test_the_time_does_not_go_on_after_the_last_sample(engine: Any) -> None:
    @strategy
    async def idle(thread: Thread) -> Thread:
        (winner,) = await thread.fork(2).race()
        await asyncio.sleep(0.01)
        return winner

    assert run(engine(12, 30), idle()).usage.wall_seconds == 12 / RATE


def test_releasing_a_run_cancels_what_runs_of_it(engine: Any) -> None:
    replay = engine(100)

    async def main() -> None:
        graph = ThreadGraph()
        root = graph.add(spans=[await replay.encode_prompt("go")])
        node = graph.add([Edge(root.id, len(root))])
        stream = replay.generate(Request(graph, node, Sampling()))
        assert replay.load().requests == 1
        await replay.close()
        assert [delta.finish_reason async for delta in stream] == ["cancelled"]

    asyncio.run(main())
    at_rest(replay)


def test_a_second_race_counts_from_where_it_begins(engine: Any) -> None:
    @strategy
    async def twice(thread: Thread) -> Thread:
        (first,) = await thread.fork(2).race()
        assert (first.answer, thread._run.clock.now()) == ("0", 8 / RATE)
        (second,) = await thread.fork(2).race()
        return second

    outcome = run(engine(8, 30, 25, 10), twice())
    assert charged(outcome) == [8, 8, 11, 10]
    assert outcome.usage.critical_path_tokens == 8 + 10
    assert outcome.usage.wall_seconds == 8 / RATE + 11 / RATE


def test_long_samples_take_little_real_time(engine: Any) -> None:
    outcome = run(engine(*range(32_000, 32_064)), "first_finish(samples=64, first=32)")
    assert outcome.usage.critical_path_tokens == 32_031
    assert outcome.usage.sampled_tokens == sum(range(32_000, 32_032)) + 32 * 32_031
    nodes = len(outcome.graph.nodes)
    assert nodes == 65


@st.composite
def recordings(draw: st.DrawFn) -> tuple[list[tuple[int, str | None]], int]:
    samples = draw(
        st.lists(st.tuples(st.integers(1, 40), st.sampled_from(["1", "2", "3", None])), min_size=1, max_size=9)
    )
    return samples, draw(st.integers(1, len(samples)))


def vote(answers: Sequence[str | None]) -> str | None:
    counts = Counter(answer for answer in answers if answer is not None)
    return max(counts, key=lambda a: (counts[a], -answers.index(a)), default=None)


@settings(deadline=None, max_examples=150)
@given(recordings(), st.sampled_from(["tokens", "time"]), st.sampled_from([1, 7, 49, 50.0, 333.3]))
def test_first_finish_is_what_the_records_say(
    tmp_path_factory: pytest.TempPathFactory, drawn: Any, by: str, rate: float
) -> None:
    samples, first = drawn
    ranked = sorted((n, i) for i, (n, _) in enumerate(samples))
    limit, last = ranked[first - 1]
    winners = [i for _, i in ranked[:first]]
    losers = [limit + (by == "tokens" and i < last) for _, i in ranked[first:]]
    lines = [line(i, n, a, text="" if a is None else "t") for i, (n, a) in enumerate(samples)]
    replay = ReplayEngine(write(tmp_path_factory.mktemp("replay") / "r.jsonl", lines), rate=rate)
    outcome = run(replay, f"first_finish(samples={len(samples)}, first={first}, by='{by}')")
    assert outcome.answer == vote([samples[i][1] for i in winners])
    assert outcome.usage.sampled_tokens == sum(samples[i][0] for i in winners) + sum(losers)
    assert outcome.usage.critical_path_tokens == limit
    assert outcome.usage.wall_seconds == pytest.approx(max([limit, *losers]) / rate, rel=1e-12)


@settings(deadline=None, max_examples=150)
@given(recordings(), st.integers(1, 45), st.sampled_from([1, 7, 49, 50.0]), st.booleans())
def test_self_consistency_in_so_many_seconds_is_what_the_records_say(
    tmp_path_factory: pytest.TempPathFactory, drawn: Any, tokens: int, rate: float, between: bool
) -> None:
    samples, _ = drawn
    ranked = sorted((n, i) for i, (n, _) in enumerate(samples))
    done = [(n, i) for n, i in ranked if n <= tokens]
    cut = len(done) < len(ranked)
    seconds = (tokens + 0.5 * between) / rate
    lines = [line(i, n, a, text="" if a is None else "t") for i, (n, a) in enumerate(samples)]
    replay = ReplayEngine(write(tmp_path_factory.mktemp("replay") / "r.jsonl", lines), rate=rate)
    outcome = run(replay, f"self_consistency(samples={len(samples)})", budget=f"wall_seconds={seconds!r}")
    # Whoever is stopped votes in the order of the finish; a vote over all is in the order of the forks.
    order = [i for _, i in done] if cut else range(len(samples))
    assert outcome.answer == vote([samples[i][1] for i in order])
    assert outcome.stopped_by == ("wall_seconds" if cut else None)
    assert outcome.usage.sampled_tokens == sum(min(n, tokens) for n, _ in ranked)
    assert outcome.usage.wall_seconds == (seconds if cut else ranked[-1][0] / rate)
