from __future__ import annotations

import asyncio

import pytest
import torch
from engines import WARM, opened, quiet, root

from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.engine import Request, Sampling
from orchestra.testing import check_parity
from orchestra.testing.graphs import generate


def test_a_fork_into_64_holds_one_copy(tiny):
    async def main():
        async with opened(tiny, max_batch=64) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph, "x" * 999)
            assert len(start) == 1000
            token_bytes = engine._open()[0].memory.token_bytes
            children = [graph.add([Edge(0, 1000)], path=[i]) for i in range(64)]
            warm = Sampling(1.0, max_tokens=40, ignore_eos=True)
            peak = 0

            async def watch():
                nonlocal peak
                while True:
                    peak = max(peak, engine.load().cached_bytes)
                    await asyncio.sleep(0.001)

            watcher = asyncio.create_task(watch())
            await asyncio.gather(*(generate(engine, graph, child, warm) for child in children))
            watcher.cancel()
            # While they run: the prompt once, and slots of 64 tokens for tails of 40. One copy each would be 65,000.
            assert peak <= (1000 + 64 * (64 + 40)) * token_bytes
            load = await quiet(engine)
            assert load.cached_tokens == 1000 + 64 * 39
            assert load.cached_bytes == (1000 + 64 * 40) * token_bytes
            assert load.computed_tokens == load.cached_tokens

    asyncio.run(main())


def test_a_node_that_still_grows_can_be_forked(tiny):
    """Threads in the background: an edge takes what is there, and the parent goes on."""

    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            parent = await root(engine, graph)
            prompt = len(parent)
            parent.spans.append(Span("sampled"))
            stream = engine.generate(Request(graph, parent, Sampling(max_tokens=400, ignore_eos=True), chunk=1))
            children = []

            async def child(length):
                node = graph.add([Edge(0, length)], path=[length])
                children.append(node)
                await generate(engine, graph, node, WARM)

            async with asyncio.TaskGroup() as group:
                async for delta in stream:
                    span = parent.spans[-1]
                    span.tokens += delta.tokens
                    span.logprobs += delta.logprobs
                    span.count += delta.count
                    if span.count in (1, 5, 30, 100) or span.count % 60 == 0:
                        group.create_task(child(len(parent)))
                    if span.count == 50:
                        group.create_task(child(prompt + 20))
            assert len(children) >= 3
            await check_parity(engine, graph)

    asyncio.run(main())


def test_cached_tokens_are_what_an_earlier_request_left(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            first = graph.add([Edge(0, len(start))])
            assert (await generate(engine, graph, first, WARM)).cached_tokens == 0
            second = graph.add([Edge(first.id, len(first))])
            # All but the token that was sampled last.
            assert (await generate(engine, graph, second, WARM)).cached_tokens == len(start) + len(first) - 1

    asyncio.run(main())


def test_scores_are_log_probabilities_of_given_text(tiny):
    async def main():
        async with opened(tiny, prefill=4) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph, "the cat sat on the mat")
            node = graph.add([Edge(0, 5)], spans=[await engine.encode(" and the dog")])
            first, second = await asyncio.gather(engine.score(graph, start), engine.score(graph, node))
            ids = start.tokens[:5] + node.tokens
            with torch.no_grad():
                logits = engine.plain_model()(torch.tensor([ids])).logits[0].log_softmax(-1)
            right = [float(logits[i - 1, ids[i]]) for i in range(5, len(ids))]
            assert second == pytest.approx(right, abs=1e-4)
            assert first[0] == 0.0
            assert first[1:5] == pytest.approx([float(logits[i - 1, ids[i]]) for i in range(1, 5)], abs=1e-4)
            await engine.release(graph)
            assert engine.load().cached_bytes == 0

    asyncio.run(main())


def test_a_scoring_that_is_cancelled_leaves_nothing(tiny):
    async def main():
        async with opened(tiny, prefill=4) as engine:
            graph = ThreadGraph()
            node = await root(engine, graph, "z" * 600)
            task = asyncio.create_task(engine.score(graph, node))
            await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (await quiet(engine)).cached_bytes == 0

    asyncio.run(main())
