from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading

import pytest
from engines import WARM, opened, quiet, root

from orchestra.errors import EngineError, PromptError
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.engine import Delta, Request, Sampling
from orchestra.runtime.local.engine import LocalEngine
from orchestra.testing import check_parity
from orchestra.testing.graphs import generate


def test_cancel_gives_everything_that_was_sampled(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            node = await root(engine, graph)
            stream = engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=3))
            first = await anext(stream)
            stream.cancel()
            stream.cancel()
            whole = Delta()
            whole.merge(first)
            async for delta in stream:
                whole.merge(delta)
            stream.cancel()
            assert whole.finish_reason == "cancelled"
            assert whole.count == engine.load().sampled_tokens == len(whole.logprobs)
            node.spans.append(Span("sampled", whole.tokens, whole.count, whole.text, whole.logprobs))
            again = graph.add([Edge(0, len(node))])
            await generate(engine, graph, again, WARM)  # what was cancelled can be gone on from
            await check_parity(engine, graph)

    asyncio.run(main())


def test_close_ends_what_runs_and_can_be_repeated(tiny):
    others = set(threading.enumerate())  # engines that other tests of the process keep open

    async def main():
        engine = await LocalEngine(tiny).open()
        graph = ThreadGraph()
        node = await root(engine, graph)
        stream = engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=1))
        await anext(stream)
        await engine.close()
        deltas = [delta async for delta in stream]
        assert deltas[-1].finish_reason == "cancelled"
        assert engine.load().requests == engine.load().cached_bytes == 0
        await engine.close()
        await engine.release(graph)
        with pytest.raises(EngineError, match="closed"):
            await generate(engine, graph, graph.add([Edge(0, 2)]), WARM)
        with pytest.raises(EngineError, match="closed"):
            await engine.encode("x")
        ours = set(threading.enumerate()) - others
        assert not any(thread.name == "orchestra-engine" for thread in ours if thread.is_alive())

    asyncio.run(main())


def test_a_step_that_crashes_fails_its_streams_and_the_engine_goes_on(tiny, monkeypatch):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            node = await root(engine, graph)
            model = engine._open()[0]
            before = await generate(
                engine, graph, graph.add([Edge(0, len(node))]), Sampling(max_tokens=5, ignore_eos=True)
            )
            with monkeypatch.context() as patch:
                patch.setattr(type(model), "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory left")))
                running = [graph.add([Edge(0, len(node))], path=[i]) for i in range(3)]
                for result in await asyncio.gather(
                    *(generate(engine, graph, n, WARM) for n in running),
                    engine.score(graph, node),
                    return_exceptions=True,
                ):
                    assert isinstance(result, EngineError)
                    assert "no memory left" in str(result)
            after = await generate(
                engine, graph, graph.add([Edge(0, len(node))]), Sampling(max_tokens=5, ignore_eos=True)
            )
            assert after.tokens == before.tokens
            await engine.release(graph)
            assert engine.load().cached_bytes == 0

    asyncio.run(main())


def test_requests_of_a_closed_loop_are_dropped(tiny):
    engine = LocalEngine(tiny)

    async def abandon():
        await engine.open()
        graph = ThreadGraph()
        node = await root(engine, graph)
        stream = engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=1))
        await anext(stream)
        return graph

    graph = asyncio.run(abandon())

    async def main():
        await quiet(engine)
        other = ThreadGraph()
        assert (await generate(engine, other, await root(engine, other), WARM)).count == 8
        await engine.release(other)
        await engine.release(graph)
        assert engine.load().cached_bytes == 0
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_event_loops_in_several_threads_share_an_engine(tiny):
    engine = LocalEngine(tiny)
    results = {}

    async def work(seed):
        graph = ThreadGraph()
        start = await root(engine, graph)
        nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(4)]
        deltas = await asyncio.gather(*(generate(engine, graph, node, WARM, seed=seed) for node in nodes))
        await engine.release(graph)
        return [delta.tokens for delta in deltas]

    def run(i):
        results[i] = asyncio.run(work(i % 2))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[0] == results[2] != results[1] == results[3]
    assert engine.load().requests == engine.load().cached_bytes == 0
    asyncio.run(engine.close())


def test_what_the_engine_cannot_do_is_an_error_not_a_hang(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            with pytest.raises(PromptError, match="empty"):
                await generate(engine, graph, graph.add(), WARM)
            told = graph.add(spans=[Span("sampled", [], 7, "no ids")])
            with pytest.raises(EngineError, match="only 0 token ids"):
                await generate(engine, graph, graph.add([Edge(told.id, 7)]), WARM)
            node = await root(engine, graph)
            stream = engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=1))
            await anext(stream)
            with pytest.raises(EngineError, match="generated already"):
                await generate(engine, graph, node, WARM)
            await engine.release(graph)
            assert engine.load().requests == 0

    asyncio.run(main())


def test_long_prompts_do_not_stall_others(tiny):
    """Chunked prefill: while a long prompt is computed, others go on."""

    async def main():
        async with opened(tiny, prefill=16) as engine:
            graph, other = ThreadGraph(), ThreadGraph()
            node = await root(engine, graph)
            stream = engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=1))
            await anext(stream)
            long = await root(engine, other, "y" * 1600)
            child = other.add([Edge(0, len(long))])
            waiting = asyncio.create_task(generate(engine, other, child, Sampling(max_tokens=1, ignore_eos=True)))
            count = 0
            while not waiting.done():
                count += (await anext(stream)).count
            stream.cancel()
            assert count >= 50  # of 100 chunks
            await engine.release(graph)
            await check_parity(engine, other)

    asyncio.run(main())


def test_max_batch_is_kept_and_everybody_gets_a_turn(tiny):
    async def main():
        async with opened(tiny, max_batch=3) as engine:
            scheduler = engine._open()[2]._scheduler
            most = 0
            true = scheduler.step

            def counted():
                nonlocal most
                busy = true()
                most = max(most, sum(len(slab.jobs) for slab in scheduler.arena.slabs.values()))
                return busy

            scheduler.step = counted
            graph = ThreadGraph()
            start = await root(engine, graph)
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(10)]
            deltas = await asyncio.gather(*(generate(engine, graph, node, WARM) for node in nodes))
            assert [delta.count for delta in deltas] == [8] * 10
            assert most == 3

    asyncio.run(main())


def test_every_pair_of_siblings_differs_unless_greedy(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)

            async def fork(sampling, seed):
                nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(4)]
                deltas = await asyncio.gather(*(generate(engine, graph, n, sampling, seed=seed) for n in nodes))
                return [tuple(delta.tokens) for delta in deltas]

            warm = await fork(WARM, 1)
            assert all(a != b for a, b in itertools.combinations(warm, 2))
            assert await fork(WARM, 1) == warm
            assert not set(await fork(WARM, 2)) & set(warm)
            assert len(set(await fork(Sampling(max_tokens=8, ignore_eos=True), 1))) == 1

    asyncio.run(main())


def test_leaving_without_close_is_no_crash(tiny):
    """As after Ctrl-C: the interpreter goes down while a generation runs."""
    script = f"""
import asyncio
from orchestra.graph import Span, ThreadGraph
from orchestra.runtime.engine import Request, Sampling
from orchestra.runtime.local.engine import LocalEngine

async def main():
    engine = await LocalEngine({tiny!r}).open()
    graph = ThreadGraph()
    node = graph.add(spans=[Span("prompt", [1, 20, 30], 3)])
    await anext(engine.generate(Request(graph, node, Sampling(ignore_eos=True), chunk=1)))
    raise KeyboardInterrupt

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("KeyboardInterrupt")
