"""Programs of threads on the real engine: what they sampled from is what one training-style forward gives."""

from __future__ import annotations

import asyncio
from typing import Literal

import pytest

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.errors import PromptError
from orchestra.runtime.connect import open_engine
from orchestra.testing import check_parity
from orchestra.threads import Threads

PROMPT = "numbers: 3 7 8 12 target: 54"


@strategy
async def branching(thread: Thread, how: str = "reuse") -> Thread:
    """Nested forks, a race, a resampling, and joins of joins."""
    assert how in ("reuse", "recompute")
    join: Literal["reuse", "recompute"] = "reuse" if how == "reuse" else "recompute"
    inner: list[Thread] = []
    for branch in thread.append("\n step:").fork([" 8 + 3 =", " 12 - 7 ="]):
        leaves = await branch.fork(2).generate(max_tokens=5, temperature=1.0)
        leaves = Threads(leaves).resample([1, 1])
        leaves = await leaves.generate(max_tokens=3, temperature=1.0)
        inner.append(await branch.join(leaves, " left:", how=join).generate(max_tokens=4, temperature=1.0))
    (winner,) = await thread.fork(3).race(max_tokens=8, temperature=1.0)
    assert winner.finish_reason == "length"
    base = thread.append("\n step:")  # the same text again: a thread of its own, so nothing of it joins
    with pytest.raises(orchestra.OrchestraError, match=r"forked from this one|joins 2 branches by reuse"):
        await base.join(inner, " none", how="recompute").generate()
    return await inner[0].append("\n answer:").generate(max_tokens=6)


@pytest.mark.parametrize("how", ["reuse", "recompute"])
def test_parity_of_a_program(how: str) -> None:
    async def main() -> Outcome:
        engine = open_engine("demo")
        try:
            async with orchestra.connect(engine) as connection:
                outcome = await connection.run(branching(how=how), PROMPT, seed=3)
            assert engine.load().cached_bytes == engine.load().requests == 0
            await check_parity(engine, outcome.graph)
            await engine.release(outcome.graph)
            return outcome
        finally:
            await engine.close()

    outcome = asyncio.run(main())
    joins = [node for node in outcome.graph.nodes if len(node.context) > 1]
    assert len(joins) == (2 if how == "reuse" else 0)
    assert outcome.usage.sampled_tokens == outcome.graph.count("sampled")


def test_scores_of_a_text_are_the_log_probabilities_of_sampling_it() -> None:
    @strategy
    async def scoring(thread: Thread) -> Thread:
        said = await thread.generate(max_tokens=12)
        assert await thread.score(said.generated) == pytest.approx(said.logprobs, abs=1e-4)
        return said

    asyncio.run(_demo(scoring()))


def test_a_continuation_leaves_out_the_end_of_sequence() -> None:
    @strategy
    async def again(thread: Thread) -> Thread:
        child = thread.spawn(["step: 7 + 3 = 10 left: 8 10 12 target: 54"])[0]
        ended = await child.generate()
        assert ended.finish_reason == "stop"
        assert ended.matched is None
        more = await ended.append("\n").generate(max_tokens=3)
        node, length = more._run.graph.nodes[-1].context[0]
        assert length == len(more._run.graph.nodes[node]) - 1
        return more

    asyncio.run(_demo(again()))


def test_text_outside_the_vocabulary_is_refused_wherever_it_comes_in() -> None:
    @strategy
    async def chatty(thread: Thread) -> Thread:
        return await thread.append("\nWeigh these:\n").generate()

    with pytest.raises(PromptError, match="'Weigh', 'these:'"):
        asyncio.run(_demo(chatty()))


async def _demo(program: orchestra.Strategy) -> Outcome:
    async with orchestra.connect() as connection:
        return await connection.run(program, PROMPT)
