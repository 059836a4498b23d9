"""Budgets: never passed, used to the end, nested, and the best so far when they end."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import orchestra
from orchestra import Budget, Outcome, Thread, strategy
from orchestra.testing.scripted import EOS, ScriptedEngine


def run(spec: Any, lengths: list[int], budget: str | None, **more: Any) -> Outcome:
    def script(_: str, path: tuple[int, ...]) -> str:
        n = lengths[(path[-1] if path else 0) % len(lengths)]
        return "".join([" w"] * (n - 2)) + f" {n} {EOS}"

    engine = ScriptedEngine(script)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(spec, "go", budget=budget, **more)

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens
    return outcome


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(1, 80), st.none() | st.integers(1, 20))
def test_sampled_tokens_are_never_passed_and_used_to_the_end(lengths: list[int], limit: int, cap: int | None) -> None:
    spec = orchestra.SelfConsistency(samples=len(lengths), drafts=orchestra.Sample(max_tokens=cap))
    outcome = run(spec, lengths, f"sampled_tokens={limit}")
    wanted = sum(min(n, cap or n) for n in lengths)
    assert outcome.usage.sampled_tokens == min(wanted, limit)
    assert (outcome.stopped_by == "sampled_tokens") == (wanted > limit)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(1, 35))
def test_critical_path_cuts_each_branch_and_the_others_finish(lengths: list[int], limit: int) -> None:
    outcome = run(f"self_consistency(samples={len(lengths)})", lengths, f"critical_path_tokens={limit}")
    assert outcome.usage.critical_path_tokens == min(limit, max(lengths))
    done = [n for n in lengths if n <= limit]
    assert len(outcome.candidates) == len(done)
    assert (outcome.stopped_by is None) == (len(done) == len(lengths))
    assert outcome.answer in {None, *map(str, done)}


def test_wall_seconds_returns_the_best_offered_so_far() -> None:
    outcome = run("self_consistency(samples=3)", [4, 200_000, 4], "wall_seconds=6.5")
    assert outcome.stopped_by == "wall_seconds"
    assert outcome.answer == "4"
    assert len(outcome.candidates) == 2
    assert outcome.usage.wall_seconds == 6.5  # of the engine's clock: a token takes one second
    assert outcome.usage.sampled_tokens == 4 + 6 + 4


def test_requests() -> None:
    outcome = run("self_consistency(samples=5)", [4], "requests=3")
    assert outcome.stopped_by == "requests"
    assert outcome.usage.requests == 3
    assert outcome.answer == "4"


def test_a_lone_thread_keeps_what_it_has() -> None:
    outcome = run("sample", [30], "sampled_tokens=7")
    assert outcome.text == " w" * 7
    assert outcome.stopped_by == "sampled_tokens"


def test_an_inner_budget_stops_only_the_inner_strategy() -> None:
    @strategy
    async def twice(thread: Thread) -> Thread:
        inner = await thread.run("self_consistency(samples=2)", budget=Budget(sampled_tokens=10))
        assert inner.stopped_by == "sampled_tokens"
        assert inner.usage.sampled_tokens == 10
        return await thread.append(f" {inner.answer}").generate()

    outcome = run(twice(), [8], "sampled_tokens=100")
    assert outcome.stopped_by is None
    assert outcome.usage.sampled_tokens == 10 + 8
    assert run(twice(), [8], "sampled_tokens=17").stopped_by == "sampled_tokens"


def test_an_inner_critical_path_is_counted_from_where_it_begins() -> None:
    @strategy
    async def chain(thread: Thread) -> Thread:
        thread = await thread.generate()
        inner = await thread.run("sample", budget=Budget(critical_path_tokens=6))
        assert (inner.stopped_by, inner.usage.critical_path_tokens) == ("critical_path_tokens", 6)
        return inner.thread or thread

    assert run(chain(), [9], None).usage.critical_path_tokens == 9 + 6


@pytest.mark.parametrize("bad", ["sampled_tokens=0", "nothing=1"])
def test_bad_budgets(bad: str) -> None:
    with pytest.raises(orchestra.OrchestraError):
        run("sample", [3], bad)


def test_a_budget_that_ends_in_the_background_is_raised_where_it_is_awaited() -> None:
    @strategy
    async def ahead(thread: Thread, wait: bool = True) -> Thread:
        future = thread.fork(1)[0].start()
        first = await thread.generate(max_tokens=3)
        return await future if wait else first

    assert run(ahead(), [30], "critical_path_tokens=10").stopped_by == "critical_path_tokens"
    outcome = run(ahead(wait=False), [3], "critical_path_tokens=2")
    assert outcome.stopped_by == "critical_path_tokens"
    assert run(ahead(wait=False), [30], None).stopped_by is None
