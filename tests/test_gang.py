"""Generations that read each other while they grow, against one dense forward over the views that they recorded."""

from __future__ import annotations

import asyncio

import pytest
from engines import opened, quiet, root

from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.engine import Request, Sampling
from orchestra.testing import check_concurrent_parity
from orchestra.testing.graphs import generate

WARM = Sampling(1.0, max_tokens=10, ignore_eos=True)


class Side:
    """Steps of several workers, driven as a strategy would: each step a node; finished ones go to the history."""

    def __init__(self, engine, graph, layout, workers):
        self.engine, self.graph, self.layout = engine, graph, layout
        self.gang = engine.gang(graph, workers)
        self.history, self.now = [], {}
        self.before = []

    def arrange(self):
        found = {}
        for worker, node in self.now.items():
            others = [other for w, other in sorted(self.now.items()) if w != worker]
            if self.layout == "interleaved":
                others = []
            nodes = self.graph.nodes
            found[node] = [Edge(i, len(nodes[i])) for i in (*self.before, *self.history, *others)]
        self.gang.arrange(found, len(self.before) + len(self.history))

    async def step(self, worker, text, seed, sampling=WARM):
        span = await self.engine.encode(text)
        node = self.graph.add_concurrent(waits=[], path=[worker, len(self.graph.nodes)], spans=[span])
        self.now[worker] = node.id
        self.arrange()
        node.spans.append(Span("sampled"))
        stream = self.engine.generate(Request(self.graph, node, sampling, seed, tuple(node.path), gang=self.gang))
        async for delta in stream:
            sampled = node.spans[-1]
            sampled.tokens += delta.tokens
            sampled.logprobs += delta.logprobs
            sampled.count += delta.count
            node.views = delta.views or node.views
            node.finish_reason = delta.finish_reason
        if self.layout != "contiguous":
            self.history.append(node.id)
            del self.now[worker]
        return node


async def run(engine, layout, workers, steps, *, prompt="the answer is", seed=1):
    graph = ThreadGraph()
    start = await root(engine, graph, prompt)
    header = graph.add([Edge(0, len(start))], spans=[await engine.encode(" work:")])
    side = Side(engine, graph, layout, workers)
    side.before = [start.id, header.id]

    async def work(worker):
        for i in range(steps):
            text = f" worker {worker} step {i}:" if i else f" {'abc'[worker % 3]}:"
            sampling = Sampling(1.0, max_tokens=4 + (3 * worker + 5 * i) % 9, ignore_eos=True)
            await side.step(worker, text, seed, sampling)
        side.arrange()
        side.gang.leave()

    await asyncio.gather(*(work(worker) for worker in range(workers)))
    for node in graph.nodes:
        if node.views:
            node.finish_reason = "stop"
    graph.check_integrity()
    return graph


@pytest.mark.parametrize("layout", ["combined", "interleaved", "contiguous"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_views_equal_one_dense_forward(tiny, layout, workers):
    async def main():
        async with opened(tiny, debug=True) as engine:
            graph = await run(engine, layout, workers, 1 if layout == "contiguous" else 3)
            assert check_concurrent_parity(graph, engine.plain_model()) < 1e-4
            await engine.release(graph)
            load = await quiet(engine)
            assert (load.cached_tokens, load.cached_bytes) == (0, 0)

    asyncio.run(main())


@pytest.mark.parametrize("layout", ["combined", "contiguous"])
def test_what_a_gang_reads_may_be_the_middle_of_another_runs_stretch(tiny, layout):
    async def main():
        async with opened(tiny, debug=True) as engine:
            other = ThreadGraph()
            node = await root(engine, other)
            node.spans.append(await engine.encode(" work:"))
            node.spans.append(await engine.encode(" and more"))
            await generate(engine, other, node, WARM)
            prompt = len(node) - WARM.max_tokens
            before = engine.load().computed_tokens
            graph = await run(engine, layout, 2, 1 if layout == "contiguous" else 2)
            tokens = sum(len(node) for node in graph.nodes) - sum(len(node) for node in graph.nodes[:2])
            assert sum(len(node) for node in graph.nodes[:2]) < prompt  # all of it was there
            assert engine.load().computed_tokens - before <= tokens
            await engine.release(other)
            assert check_concurrent_parity(graph, engine.plain_model()) < 1e-4
            await engine.release(graph)
            assert (await quiet(engine)).cached_bytes == 0

    asyncio.run(main())


def test_others_give_way_to_a_gang_and_not_a_gang_to_them(tiny):
    """Under a limit in which a gang and one generation have room, and a dozen want it."""

    async def main():
        async with opened(tiny, debug=True, memory=330_000) as engine, opened(tiny) as free:
            graph = ThreadGraph()
            start = await root(engine, graph, "x" * 60)
            long = Sampling(1.0, max_tokens=150, ignore_eos=True)
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(12)]
            others = [asyncio.create_task(generate(engine, graph, node, long)) for node in nodes]
            for _ in range(2):
                side = await asyncio.wait_for(run(engine, "combined", 2, 2), 60)
                assert check_concurrent_parity(side, engine.plain_model()) < 1e-4
                await engine.release(side)
            said = [(await other).tokens for other in others]
            again = ThreadGraph()
            await root(free, again, "x" * 60)
            nodes = [again.add([Edge(0, len(start))], path=[i]) for i in range(12)]
            right = await asyncio.gather(*(generate(free, again, node, long) for node in nodes))
            assert said == [delta.tokens for delta in right]
            assert engine.load().peak_bytes <= 330_000
            await engine.release(graph)
            assert (await quiet(engine)).cached_bytes == 0

    asyncio.run(main())
