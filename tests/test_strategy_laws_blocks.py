"""The laws of strategies on those in which the model asks for its threads; and joined caches on a real engine."""

from __future__ import annotations

import asyncio

import pytest
from test_strategy_async_think import organiser
from test_strategy_map_reduce import SIMPLE, nested
from test_strategy_threads import SCRIPT

import orchestra
from orchestra import Outcome, Thread, strategy
from orchestra.protocols import transcript
from orchestra.runtime.local.engine import LocalEngine
from orchestra.testing import check_parity
from orchestra.testing.scripted import Script, ScriptedEngine
from orchestra.testing.strategies import check_strategy

WORKERS = {"one?": " w w 1 $", "two?": " w w w w w w w 2 $"}
ASYNC = ["<FORK-1>one?</FORK-1>", "<FORK-2>two?</FORK-2>", "<JOIN-2>", " then <JOIN-1>", " answer: 12 $"]


@pytest.mark.parametrize(
    ("spec", "script"),
    [
        ("map_reduce", SIMPLE),
        ("map_reduce", nested),
        ("map_reduce(join='recompute')", nested),
        ("threads", SCRIPT),
        ("first_finish(samples=3, drafts=map_reduce)", SIMPLE),
        ("async_think", organiser(*ASYNC, workers=WORKERS)._script),
        ("async_think(workers=1)", organiser(*ASYNC, workers=WORKERS)._script),
        ("self_consistency(samples=2, drafts=async_think)", organiser(*ASYNC, workers=WORKERS)._script),
    ],
)
def test_on_a_script(spec: str, script: Script) -> None:
    asyncio.run(asyncio.wait_for(check_strategy(ScriptedEngine(script), spec, "go"), 60))


@strategy
async def joined_and_plain(thread: Thread) -> Thread:
    """A reuse join; then the same token string as a prompt of its own, and as text on a thread of its own."""
    branches = await thread.fork([" one:", " two:"]).generate(max_tokens=6, temperature=1.0)
    joined = await thread.join(branches, " so", how="reuse").generate(max_tokens=6)
    text = joined.text.removesuffix(joined.generated)
    (alone,) = thread.spawn([str(thread.prompt) + text])
    alone = await alone.generate(max_tokens=6)
    again = await thread.append(text).generate(max_tokens=6)
    assert again.generated == alone.generated
    return joined


def test_a_joined_cache_is_never_found_by_prefix(tiny: str) -> None:
    """Trap: in the original an ordinary request whose tokens equal a joined sequence reads keys that are not its own.

    One training-style forward over all three contexts gives what the engine sampled from; that of the joined context
    differs from that of its token string.
    """

    async def main() -> tuple[Outcome, LocalEngine]:
        engine = LocalEngine(tiny)
        try:
            async with orchestra.connect(engine) as connection:
                first = await connection.run(joined_and_plain(), "the answer is", seed=4)
                await check_parity(engine, first.graph)
                await engine.release(first.graph)
                text = transcript(first.graph, first.thread._node.id).removesuffix(first.thread.generated)  # type: ignore[union-attr]  # it returned a thread
                later = await connection.run("sample(max_tokens=6)", "the answer is" + text, seed=4)
                await check_parity(engine, later.graph)
                await engine.release(later.graph)
        finally:
            await engine.close()
        return first, later

    first, later = asyncio.run(main())
    joined = next(node for node in first.graph.nodes if len(node.context) == 2)
    graph = first.graph
    spawned = [node for node in graph.nodes if node.count("sampled") and 0 not in {node.id, *graph.view(node.context)}]
    (plain,) = spawned
    assert later.text == plain.spans[-1].text
    ours, theirs = joined.spans[-1].logprobs[0], plain.spans[-1].logprobs[0]
    assert joined.spans[-1].tokens != plain.spans[-1].tokens or abs(ours - theirs) > 1e-4
