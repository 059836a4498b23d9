"""The verbs of threads: forks, joins, races, background work, and the graph that they leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import orchestra
from orchestra import Outcome, Thread, ThreadGraph, strategy
from orchestra.errors import CapabilityError, EngineError, OrchestraError, UsageError
from orchestra.runtime.engine import Delta, Stream
from orchestra.testing.scripted import ScriptedEngine, replies, words


def run(program: Callable[[Thread], Any], engine: ScriptedEngine, prompt: str = "a b c", **settings: Any) -> Outcome:
    @strategy
    async def anonymous(thread: Thread) -> Any:
        return await program(thread)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(anonymous(), prompt, **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    outcome.graph.check_integrity()
    assert engine.load().requests == 0
    assert engine.released == [outcome.graph]
    assert outcome.graph.count("sampled") == engine.load().sampled_tokens == outcome.usage.sampled_tokens
    return outcome


def test_one_generation() -> None:
    outcome = run(lambda t: t.generate(), ScriptedEngine(replies(" the answer: 42 $")))
    assert outcome.text == " the answer: 42"
    assert outcome.answer == "42"
    assert outcome.usage.model_dump(exclude={"wall_seconds"}) == {
        "prompt_tokens": 3,
        "cached_tokens": 0,
        "forced_tokens": 0,
        "sampled_tokens": 4,
        "critical_path_tokens": 4,
        "sequential_tokens": 7,
        "total_tokens": 7,
        "requests": 1,
    }
    assert ThreadGraph.from_json(outcome.graph.to_json()) == outcome.graph
    assert Outcome.model_validate_json(outcome.model_dump_json()).model_dump() == outcome.model_dump()


def test_fork_shares_one_prompt_node_and_gives_each_branch_its_own_path() -> None:
    async def program(thread: Thread) -> Thread:
        branches = await thread.append(" think").fork(3).generate()
        again = await thread.fork(2).generate()
        assert [b.path for b in (*branches, *again)] == [(0,), (1,), (2,), (3,), (4,)]
        return branches[1]

    outcome = run(program, ScriptedEngine(replies(*words([2, 5, 3]))))
    roots = [node for node in outcome.graph.nodes if not node.context]
    assert [node.text for node in roots] == ["a b c"]
    shared = [node for node in outcome.graph.nodes if node.text == " think"]
    assert len(shared) == 1
    assert sum(edge.parent == shared[0].id for node in outcome.graph.nodes for edge in node.context) == 3
    assert outcome.usage.critical_path_tokens == 5 + 5  # three at once, then two at once (word counts repeat by index)


def test_going_on_twice_from_one_thread_is_a_fork() -> None:
    async def program(thread: Thread) -> Thread:
        first, second = await thread.generate(), await thread.generate()
        assert first.path != second.path
        return second

    run(program, ScriptedEngine(replies(*words(3))))


def test_critical_path_by_hand() -> None:
    """parent 3 + slowest child 7 + parent again 2; the other children are not on it."""

    async def program(thread: Thread) -> Thread:
        parent = await thread.generate(max_tokens=3)
        children = await parent.spawn(["x", "y y", "z"]).generate()
        return await parent.append(" got " + " ".join(c.generated.strip() for c in children)).generate(max_tokens=2)

    def script(context: str, path: tuple[int, ...]) -> str:
        return " ".join(words([4, 7, 5])[path[-1]].split()) if path else " ".join(["p"] * 20)

    outcome = run(program, ScriptedEngine(script))
    assert outcome.usage.critical_path_tokens == 3 + 7 + 2
    assert outcome.usage.sampled_tokens == 3 + 4 + 7 + 5 + 2
    assert outcome.usage.requests == 5
    view = outcome.graph.to_networkx()
    assert {data["kind"] for *_, data in view.edges(data=True)} == {"context", "wait"}


def test_wait_edges_follow_the_program_even_through_its_own_gather() -> None:
    async def program(thread: Thread) -> Thread:
        a, b = await asyncio.gather(*(branch.generate() for branch in thread.fork(2)))
        return await thread.spawn([a.text + b.text])[0].generate()

    outcome = run(program, ScriptedEngine(lambda _, path: words([6, 4, 2])[path[-1]]))
    assert outcome.usage.critical_path_tokens == 6 + 2


def test_joins() -> None:
    async def _join(thread: Thread, how: str) -> Thread:
        base = thread.append(" go")
        branches = await base.fork([" 1:", " 2:"]).generate(max_tokens=2)
        return await base.join(branches, " so", how=how).generate(max_tokens=1)  # type: ignore[arg-type]

    script = lambda context, path: " done" if context.endswith("so") else " x y z"  # noqa: E731
    for how in ("recompute", "reuse"):
        outcome = run(lambda t, how=how: _join(t, how), ScriptedEngine(script))
        assert outcome.text == " go 1: x y 2: x y so done"
        last = outcome.graph.nodes[-1]
        if how == "recompute":
            assert (
                outcome.graph.path_tokens(last.id)[:4] == outcome.graph.path_tokens(0) + outcome.graph.nodes[1].tokens
            )
            assert last.start == 4
            assert last.count("forced") == 2 * 3 + 1
        else:
            assert [edge.length for edge in last.context] == [3, 3]
            assert last.start == 4 + 3
            assert last.count("forced") == 1
        assert outcome.usage.critical_path_tokens == 3
    with pytest.raises(CapabilityError, match="how='recompute'"):
        run(lambda t: _join(t, "reuse"), ScriptedEngine(script, reuse_join=False))
    assert "so done" in run(lambda t: _join(t, "auto"), ScriptedEngine(script, reuse_join=False)).text


def test_recompute_join_leaves_out_the_end_of_sequence_token() -> None:
    async def program(thread: Thread) -> Thread:
        branches = await thread.fork(2).generate()
        return await thread.join(branches, " so", how="recompute").generate()

    outcome = run(program, ScriptedEngine(lambda c, _: " end $" if c.endswith("so") else " x $"))
    assert outcome.text == " x x so end"
    assert outcome.graph.nodes[-1].count("forced") == 3


def test_join_of_strangers_and_reuse_without_text_are_refused() -> None:
    async def strangers(thread: Thread) -> Thread:
        return await thread.join(await thread.spawn(["q"]).generate(), " so", how="recompute").generate()

    async def silent(thread: Thread) -> Thread:
        return thread.join(await thread.fork(2).generate(), how="reuse")

    with pytest.raises(UsageError, match="forked from this one"):
        run(strangers, ScriptedEngine(replies(" x $")))
    with pytest.raises(UsageError, match="needs text"):
        run(silent, ScriptedEngine(replies(" x $")))


@pytest.mark.parametrize("by", ["tokens", "time"])
def test_race_takes_the_first_cancels_the_rest_and_charges_what_they_had(by: str) -> None:
    async def program(thread: Thread) -> Thread:
        winners = await thread.fork(4).race(first=2, by=by)  # type: ignore[arg-type]
        assert [w.path for w in winners] == [(2,), (1,)]
        return winners[0]

    outcome = run(program, ScriptedEngine(replies(*words([50, 6, 4, 80]))))
    assert outcome.usage.critical_path_tokens == 6  # both winners are waited for
    reasons = [node.finish_reason for node in outcome.graph.nodes if node.count("sampled")]
    assert reasons == ["cancelled", "stop", "stop", "cancelled"]
    assert 4 + 6 + 2 * 6 <= outcome.usage.sampled_tokens <= 4 + 6 + 2 * 8


def test_race_by_tokens_does_not_depend_on_the_schedule() -> None:
    """The shorter thread wins although it begins later; equal ones are ranked by fork index."""

    async def program(thread: Thread) -> Thread:
        async def late(branch: Thread) -> Thread:
            if branch.path[-1] == 1:
                for _ in range(200):
                    await asyncio.sleep(0)
            return await branch.generate()

        (winner,) = await thread.fork(3).race(by="tokens", work=late)
        assert winner.path == (1,)
        (tie,) = await thread.fork(2).race(by="tokens")
        assert tie.path == (3,)
        return winner

    run(program, ScriptedEngine(lambda _, path: words([9, 5, 7, 6, 6])[path[-1]]))


def test_race_of_too_few_is_refused() -> None:
    with pytest.raises(UsageError, match="1 to 2 winners"):
        run(lambda t: t.fork(2).race(first=3), ScriptedEngine(replies(" x $")))


def test_background_work_is_awaited_or_cancelled() -> None:
    async def program(thread: Thread) -> Thread:
        kept, lost = thread.fork(1)[0].start(), thread.fork(1)[0].start()
        done = await kept
        assert not lost.done()
        return done

    outcome = run(program, ScriptedEngine(replies(*words([5, 500]))))
    assert outcome.usage.critical_path_tokens == 5
    assert [n.finish_reason for n in outcome.graph.nodes if n.started is not None] == ["stop", "cancelled"]


def test_resample_refers_to_the_same_keys_and_values() -> None:
    async def program(thread: Thread) -> Thread:
        particles = await thread.fork(3).generate(max_tokens=2)
        again = particles.resample([2, 2, 0])
        assert len({p.path for p in again}) == 3
        more = await again.generate(max_tokens=2)
        nodes = thread._run.graph.nodes
        assert [nodes[m._node.id].context[0].parent for m in more if m._node] == [
            p._node.id for p in (particles[2], particles[2], particles[0]) if p._node
        ]
        return more[0]

    run(program, ScriptedEngine(lambda _, path: " x y z"))


def test_an_error_in_one_branch_cancels_the_others_and_comes_out_alone() -> None:
    async def program(thread: Thread) -> Any:
        async def work(branch: Thread) -> Thread:
            if branch.path == (1,):
                raise EngineError("lost")
            return await branch.generate()

        return await thread.fork(3).map(work)

    engine = ScriptedEngine(replies(*words(1000)))
    with pytest.raises(EngineError, match="lost"):
        run(program, engine)
    assert engine.load().requests == 0


def test_cancelling_a_run_stops_the_engine() -> None:
    engine = ScriptedEngine(replies(*words(100_000)))

    async def main() -> None:
        async with orchestra.connect(engine) as connection:
            task = asyncio.create_task(connection.run("self_consistency(samples=4)", "go"))
            while engine.load().sampled_tokens < 40:  # noqa: ASYNC110 (the engine has no event for it)
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert engine.load().requests == 0
            (graph,) = engine.released
            assert graph.count("sampled") == engine.load().sampled_tokens
            assert len(asyncio.all_tasks()) <= 2  # this one, and the player about to end

    asyncio.run(main())


def test_stream_tells_what_happens_in_order() -> None:
    async def main() -> None:
        engine = ScriptedEngine(replies(" one two $"))
        async with orchestra.connect(engine) as connection:
            events = [event async for event in connection.stream("self_consistency(samples=2)", "go")]
            assert [e.kind for e in events if e.path == (1,)] == ["start", "token", "token", "end"]
            assert "".join(e.text for e in events if e.kind == "token" and e.path == (0,)) == " one two"
            assert events[-1].outcome is not None
            assert events[-1].outcome.text == " one two"
            async for _ in connection.stream("sample", "go"):
                break  # leaving the loop cancels the run

    asyncio.run(main())


def test_sync_twin_works_inside_a_running_loop() -> None:
    assert orchestra.run("sample", "go", engine=ScriptedEngine(replies(" 7 $"))).answer == "7"

    async def notebook() -> str | None:
        return orchestra.run("sample", "go", engine=ScriptedEngine(replies(" 8 $"))).answer

    assert asyncio.run(notebook()) == "8"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is at least 1"),
        ({"heat": 3}, "unknown sampling setting heat"),
        ({"prompt": "  "}, "prompt is empty"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OrchestraError, match=message):
        run(lambda t: t.generate(), ScriptedEngine(replies(" x $")), **settings)


def test_a_thread_that_fills_the_context_ends_by_length_and_the_run_goes_on() -> None:
    async def program(thread: Thread) -> Thread:
        thread = await thread.generate(max_tokens=4)
        thread = await thread.append(" and a text that goes past the end").generate()
        assert (thread.finish_reason, thread.sampled_tokens) == ("length", 0)
        return await thread.append(" more").generate()

    engine = ScriptedEngine(replies(*words(30)))
    engine.context_length = 12
    outcome = run(program, engine)
    assert outcome.finish_reason == "length"
    assert outcome.text.endswith("past the end more")


def test_what_came_before_an_engines_error_is_counted() -> None:
    async def main() -> list[int]:
        stream = Stream(lambda: None)
        stream.push(Delta([1, 2], 2))
        stream.fail(EngineError("gone"))
        seen = [delta.count for delta in [await anext(stream)]]
        with pytest.raises(EngineError, match="gone"):
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        return seen

    assert asyncio.run(main()) == [2]
