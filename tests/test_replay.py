"""Replayed samples: who wins, what the losers are charged and how long it takes, all counted by hand."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchestra
from orchestra import Outcome, Thread, ThreadGraph, strategy
from orchestra.errors import CapabilityError, OrchestraError, PromptError, UsageError
from orchestra.graph import Edge
from orchestra.runtime.clock import SimulatedClock
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Load, Request, Sampling
from orchestra.runtime.recording import Recording
from orchestra.runtime.replay import ReplayEngine
from orchestra.testing import ScriptedEngine, check_strategy
from orchestra.testing.scripted import replies

RATE = 49  # 1 / 49 * 49 is not 1 in floats


def line(repeat: int = 0, tokens: int = 10, answer: str | None = "7", **values: Any) -> dict[str, Any]:
    known = {"task": "sums", "id": "a", "text": "x" * tokens, "finish_reason": "stop"}
    return known | {"repeat": repeat, "sampled_tokens": tokens, "answer": answer} | values


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., ReplayEngine]:
    def make(*tokens: int, answers: Sequence[str | None] = (), rate: float = RATE, **values: Any) -> ReplayEngine:
        said = answers or [str(i) for i in range(len(tokens))]
        lines = [line(i, n, a, **values) for i, (n, a) in enumerate(zip(tokens, said, strict=True))]
        return ReplayEngine(write(tmp_path / "samples.jsonl", lines), rate=rate)

    return make


def run(engine: ReplayEngine, spec: Any, prompt: Any = "go", **settings: Any) -> Outcome:
    async def main() -> Outcome:
        tasks = asyncio.all_tasks()
        async with orchestra.connect(engine) as connection:
            outcome = await connection.run(spec, prompt, **settings)
        assert asyncio.all_tasks() == tasks
        return outcome

    before = engine.load().sampled_tokens
    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    at_rest(engine)
    assert outcome.usage.sampled_tokens == outcome.graph.count("sampled") == engine.load().sampled_tokens - before
    assert ThreadGraph.from_json(outcome.graph.to_json()) == outcome.graph
    return outcome


def at_rest(engine: ReplayEngine) -> None:
    assert engine.load() == Load(sampled_tokens=engine.load().sampled_tokens)
    assert not engine._timelines


async def passed(thread: Thread, seconds: float) -> None:
    """Wait until so many seconds of the run have passed."""
    clock, over = thread._run.clock, asyncio.Event()
    assert isinstance(clock, SimulatedClock)
    clock.call_at(seconds, over.set)
    await over.wait()


def charged(outcome: Outcome) -> list[int]:
    """Sampled tokens by fork index."""
    forks = [node for node in outcome.graph.nodes if node.started is not None]
    return [node.count("sampled") for node in sorted(forks, key=lambda node: node.path)]


# -- races ---------------------------------------------------------------------------------------------------------


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


# -- budgets and limits --------------------------------------------------------------------------------------------


def test_time_takes_the_tokens_at_the_rate(engine: Any) -> None:
    outcome = run(engine(100, rate=50), "sample")
    assert outcome.usage.model_dump() == {
        "prompt_tokens": 1, "cached_tokens": 0, "forced_tokens": 0, "sampled_tokens": 100, "critical_path_tokens": 100,
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


# -- whose samples -------------------------------------------------------------------------------------------------


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


# -- what is refused -----------------------------------------------------------------------------------------------


@strategy
async def goes_on(thread: Thread) -> Thread:
    return await (await thread.generate()).generate()


@strategy
async def writes(thread: Thread) -> Thread:
    return await thread.append("Well,").generate()


@strategy
async def joins(thread: Thread, how: Any = "reuse") -> Thread:
    branches = await thread.fork(2).generate()
    return await thread.join(branches, " so" if how == "reuse" else "", how=how).generate()


@strategy
async def feeds_back(thread: Thread) -> Thread:
    return await thread.spawn(["Another question"])[0].generate()


@strategy
async def asks_again(thread: Thread) -> Thread:
    return await thread.spawn([thread.prompt])[0].generate()


@strategy
async def nests(thread: Thread) -> Thread:
    return await thread.fork(2)[1].fork(2)[0].generate()


@strategy
async def twice(thread: Thread) -> Thread:
    await thread.generate()
    return await thread.fork(1)[0].generate()


@strategy
async def stops(thread: Thread, sampling: dict[str, Any]) -> Thread:
    return await thread.generate(**sampling)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spawn_join", r"spawn_join needs continue, which replay:samples.jsonl cannot \(recorded samples cannot be"),
        ("best_of", "best_of needs logprobs.*local:"),
        (goes_on(), "cannot go on after a sampled thread: recorded samples cannot be continued; use a local: engine"),
        (writes(), "cannot go on after text that a strategy writes: recorded samples cannot be continued"),
        (joins(), "recorded samples cannot be continued|text that a strategy writes"),
        (joins(how="recompute"), "cannot go on after text that a strategy writes"),
        (feeds_back(), "samples of the run's own prompt, not of one that a strategy writes; local:PATH"),
        (nests(), r"one fork index, and a thread was forked 2 times \(path \(1, 0\)\)"),
        ("first_finish(samples=2, drafts=self_consistency(samples=2))", "one fork index"),
        (twice(), "sample 0 of item 'sums/a' was asked for twice in one run"),
        ("self_consistency(samples=4)", r"sample 3 of item 'sums/a' was asked for, but samples.jsonl has 3 \(0 to 2\)"),
        (stops(sampling={"stop": "42"}), "recorded without the stop string '42' and goes on after it"),
        (stops(sampling={"stop_ids": 3}), "stop_ids cannot be honoured"),
        (stops(sampling={"top_logprobs": 2}), "top_logprobs cannot be honoured"),
        (stops(sampling={"ignore_eos": True}), "ended by itself: ignore_eos cannot be honoured"),
    ],
)
def test_refused(engine: Any, spec: Any, message: str) -> None:
    replay = engine(*[8] * 3, text="it is 42.")
    with pytest.raises(CapabilityError if "sample " not in message else UsageError, match=message) as caught:
        run(replay, spec)
    assert "\n" not in str(caught.value)
    at_rest(replay)


def test_not_refused_where_it_makes_no_difference(engine: Any) -> None:
    replay = engine(*[8] * 3, text="it is 42.")
    for sampling in ({"stop": ["43", "."]}, {"temperature": 1.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1}):
        assert run(replay, stops(sampling=sampling)).text == "it is 42."
    assert run(replay, asks_again()).text == "it is 42."
    cut = engine(8, text="it is 42.", finish_reason="length")
    assert run(cut, stops(sampling={"ignore_eos": True})).text == "it is 42."


def test_a_later_repeat_of_a_strategy_that_forks_would_be_the_first_again(engine: Any) -> None:
    with pytest.raises(UsageError, match="repeat 1 of a strategy that forks would be repeat 0 again; use --repeats 1"):
        run(engine(8, 8), "self_consistency(samples=2)", repeat=1)
    with pytest.raises(UsageError, match=r"sample 2 of item 'sums/a' .* has 2 \(0 to 1\)"):
        run(engine(8, 8), "sample", repeat=2)
    with pytest.raises(PromptError, match="empty"):
        run(engine(8, 8), "sample", " ")


def test_a_failed_sample_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    failed = {"task": "sums", "id": "a", "repeat": 1, "error": "connection\nlost", "text": "", "usage": {"requests": 0}}
    replay = ReplayEngine(write(tmp_path / "r.jsonl", [line(0), failed, line(4), line(2)]))
    assert run(replay, "self_consistency(samples=1)").answer == "7"
    with pytest.raises(UsageError, match=r"sample 1 of item 'sums/a' failed when it was recorded \(connection lost\)"):
        run(replay, "self_consistency(samples=3)")
    with pytest.raises(UsageError, match=r"sample 3 .* r.jsonl has 4 \(0 to 4 without 3\)"):
        run(replay, "sample", repeat=3)
    assert replay.facts()["records"] == 3


GOOD = json.dumps(line(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.jsonl has no samples: it is empty"),
        ("\n \n", "r.jsonl has no samples: it is empty"),
        (GOOD + "\n" + GOOD[:-9], r"line 2: not JSON \(.*cut off"),
        (GOOD + "\nnonsense\n" + GOOD, "line 2: not JSON"),
        ("\n[1]\n", "line 2: a recorded sample is a JSON object, not list"),
        (GOOD + "\n\n" + GOOD, "line 3: repeat 1 of item 'a' of task 'sums' is in line 1 already"),
        (json.dumps(line(-1)), "line 1: repeat: input should be greater than or equal to 0"),
        (json.dumps(line(id=7)), "line 1: id: input should be a valid string"),
        (json.dumps(line(finish_reason="cancelled")), "line 1: finish_reason: input should be 'stop' or 'length'"),
        (json.dumps(line(sampled_tokens="many")), "line 1: sampled_tokens: input should be a valid integer"),
        (json.dumps(line(sampled_tokens=0)), "line 1: sampled_tokens: 0 for a text of 10 characters"),
        (json.dumps(line(confidence=float("nan"))), "line 1: confidence: input should be a finite number"),
        (json.dumps({k: v for k, v in line().items() if k != "text"}), "line 1: text: field required$"),
        (json.dumps({k: v for k, v in line(usage={}).items() if k != "task"}), "line 1: task: .*older version"),
        (json.dumps(line(usage={"requests": 9})), "line 1: the outcome of a strategy with 9 generations, not one sample"
         "; record with --strategy sample --repeats N"),
        (b"\xff\n", "line 1: not JSON"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as caught:
        run(ReplayEngine(path), "sample")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_last_line_without_its_end_is_whole_if_it_parses(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes((json.dumps(line(0, text="a\u2028b\x00")) + "\r\n" + GOOD).encode())
    recording = Recording(tmp_path / "r.jsonl")
    assert len(recording) == 2
    sample = recording.sample(("sums", "a"), 0)
    assert sample.text == "a\u2028b\x00"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("replay:", "a replay engine needs recorded samples: replay:FILE.jsonl"),
        ("replay:no/such.jsonl", "cannot read the recorded samples in no/such.jsonl: No such file"),
        ("replay:.", "cannot read the recorded samples in .: Is a directory"),
        ("replay:x.jsonl?rate=fast", "engine parameter rate = 'fast' is not a number"),
        ("replay:x.jsonl?rate=0", "rate must be tokens a second, above 0, got 0"),
        ("replay:x.jsonl?rate=nan", "above 0, got nan"),
        ("replay:x.jsonl?speed=3", "unknown engine parameter 'speed'.*known: rate"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    async def main() -> None:
        async with orchestra.connect(url):
            pass

    with pytest.raises(OrchestraError, match=message):
        asyncio.run(main())


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
