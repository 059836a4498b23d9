"""The budgets of a run counted along its dependencies: by hand, and generations that somebody watches."""

from __future__ import annotations

import asyncio
from typing import Any

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.runtime.engine import Delta
from orchestra.testing.scripted import ScriptedEngine, replies


def run(program: Any, engine: ScriptedEngine) -> Outcome:
    @strategy
    async def anonymous(thread: Thread) -> Any:
        return await program(thread)

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(anonymous(), "one two three")

    return asyncio.run(asyncio.wait_for(main(), 20))


def test_sequential_and_total_tokens_count_the_input_of_every_call_anew() -> None:
    """Prompt 3; drafts of 3 and 6 tokens with their ends; the refinement reads 3 + 5 + 2 forced, and says 2."""

    async def program(thread: Thread) -> Thread:
        drafts = await thread.fork(2).generate()
        return await drafts[1].append(" better now:").generate()

    def script(text: str, path: tuple[int, ...]) -> str:
        return " end $" if "better" in text else " a b $" if path == (0,) else " a b c d e $"

    outcome = run(program, ScriptedEngine(script))
    calls = [(3, 3), (3, 6), (3 + 5 + 2, 2)]
    assert outcome.usage.total_tokens == sum(a + b for a, b in calls)
    assert outcome.usage.sequential_tokens == 3 + 6 + (3 + 5 + 2) + 2
    assert outcome.usage.critical_path_tokens == 6 + 2


def test_an_inner_strategy_counts_from_where_it_began() -> None:
    inner: list[Outcome] = []

    async def program(thread: Thread) -> Thread:
        first = await thread.generate()
        inner.append(await first.run("sample"))
        return inner[0].thread  # type: ignore[return-value]

    outcome = run(program, ScriptedEngine(replies(" a b c $")))
    assert (inner[0].usage.sequential_tokens, inner[0].usage.total_tokens) == (3 + 3 + 4, 3 + 3 + 4)
    assert outcome.usage.sequential_tokens == (3 + 4) + (3 + 3 + 4)


def test_a_watcher_ends_the_generation() -> None:
    engine = ScriptedEngine(replies(" a b c d e f g $"))
    seen: list[str] = []

    def watch(delta: Delta) -> bool:
        seen.append(delta.text)
        return " c" in delta.text

    async def program(thread: Thread) -> Thread:
        return await thread.generate(watch=watch)

    outcome = run(program, engine)
    assert seen == [" a", " b", " c"]
    assert outcome.finish_reason == "cancelled"
    assert outcome.text == " a b c"
    assert outcome.usage.sampled_tokens == engine.load().sampled_tokens == 3
    assert engine.load().requests == 0
