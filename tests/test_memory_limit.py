"""A limit on keys and values is a limit: everybody gets on, the results are the same, and no byte too many is held."""

from __future__ import annotations

import asyncio
import random

import pytest
from engines import opened, quiet, root, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra.errors import EngineError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Request, Sampling
from orchestra.runtime.local.admission import Admission
from orchestra.runtime.local.cache import Cache
from orchestra.runtime.local.jobs import Job
from orchestra.runtime.local.segments import SMALLEST_SLOT, Memory
from orchestra.testing import check_integrity, check_memory_limit, check_no_leak, play, random_program
from orchestra.testing.graphs import generate

TOKEN = 256  # bytes of a token of the tiny model: keys and values, 2 layers, 2 heads of 8, float32
few = settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def least(graph):
    """Bytes in which every generation of a graph fits alone: its context, and a slot of a power of two of tokens."""
    most = 0
    for node in graph.nodes:
        slot = SMALLEST_SLOT
        while slot < len(node):
            slot *= 2
        context = sum(graph.view(node.context).values())
        most = max(most, context + (slot if node.count("sampled") else len(node)))
    return most * TOKEN


async def limited(folder, seed, *, law=check_memory_limit, spare=None, tokens=None, **options):
    """Run the law in as little memory as the largest generation needs, or a little more."""
    draw = random.Random(seed)
    tokens = tokens or draw.choice([5, 12, 40])
    async with opened(folder) as other:
        limit = 0
        for i in range(3):
            played = await play(other, random_program(seed + i, tokens=tokens, nodes=6), seed=seed + i)
            limit = max(limit, least(played.graph))
            await other.release(played.graph)
        limit += draw.choice([0, 0, 10, 100, 300]) * TOKEN if spare is None else spare
        options = {"debug": True, "prefill": draw.choice([16, 512]), "max_batch": draw.choice([2, 128]), **options}
        async with opened(folder, memory=limit, **options) as engine:
            work = law(engine, other, limit, seed, tokens=tokens, nodes=6)
            return await asyncio.wait_for(work, 120), engine.load()


@given(st.integers(0, 10**6))
@few
def test_as_little_memory_as_one_generation_needs_gives_the_same_results(tiny, seed):
    compared, _ = asyncio.run(limited(tiny, seed))
    assert compared > 0


@pytest.mark.slow
@given(st.integers(0, 10**6), st.sampled_from([0, 5_000, 1 << 20]), st.sampled_from([0, 1 << 20]))
@many
def test_memory_limits_at_depth(tiny, seed, keep, copy):
    asyncio.run(limited(tiny, seed, prefix_cache=keep, copy_bytes=copy))
    asyncio.run(limited(tiny, seed, prefix_cache=keep, copy_bytes=copy, prefill=2, tokens=70))


def test_the_steps_are_bounded(tiny, monkeypatch):
    """Giving way costs work, but not without end: here every generation gives way some times."""
    preempted = []
    true = Admission._preempt
    monkeypatch.setattr(Admission, "_preempt", lambda self, work: (preempted.append(work), true(self, work)))
    (compared, load) = asyncio.run(limited(tiny, 3, spare=64 * TOKEN, tokens=70, prefill=512, max_batch=128))
    assert len(preempted) >= 3
    assert compared > 200
    assert load.computed_tokens < 20 * (load.sampled_tokens + 1000)


@pytest.mark.parametrize("keep", [0, 20_000])
def test_nothing_leaks_under_a_limit(tiny, keep):
    async def main():
        async with opened(tiny, memory=150_000, prefix_cache=keep, debug=True) as engine:
            for seed in range(3):
                await check_no_leak(engine, seed)
            load = await quiet(engine)
            assert (load.requests, load.cached_tokens, load.cached_bytes) == (0, 0, 0)
            assert load.kept_bytes <= keep
            assert load.peak_bytes <= 150_000

    asyncio.run(main())


def test_what_fits_alone_never_is_refused_and_the_rest_goes_on(tiny):
    async def main():
        limit = (100 + 128) * TOKEN
        async with opened(tiny, memory=limit, debug=True) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph, "x" * 99)
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(6)]
            lengths = [128, 500, 20, 129, 60, 128]  # of tokens to sample; with 129 a slot of 128 is too small by one
            samplings = [Sampling(1.0, max_tokens=n, ignore_eos=True) for n in lengths]
            work = [generate(engine, graph, node, how) for node, how in zip(nodes, samplings, strict=True)]
            other = ThreadGraph()
            long = await root(engine, other, "y" * 300)
            work += [generate(engine, other, other.add([Edge(0, len(long))]), samplings[2]), engine.score(other, long)]
            results = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 60)
            for i in (0, 2, 4, 5):
                assert results[i].count == lengths[i]
            needs = {1: 100 + 256, 6: 301 + 64, 7: 301}
            for i, tokens in needs.items():
                assert isinstance(results[i], EngineError)
                assert f"needs {tokens * TOKEN} bytes" in str(results[i])
                assert f"the limit is {limit} (memory=)" in str(results[i])
            assert results[3].count == 129 or "bytes" in str(results[3])
            await engine.release(graph)
            await engine.release(other)
            assert engine.load().cached_bytes == 0
            assert engine.load().peak_bytes <= limit

    asyncio.run(main())


def test_who_came_first_is_served_first(tiny):
    """With room for one at a time, generations end in the order in which they came."""

    async def main():
        async with opened(tiny, memory=(20 + 64) * TOKEN, debug=True) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            ended = []

            async def one(i):
                node = graph.add([Edge(0, len(start))], path=[i])
                await generate(engine, graph, node, Sampling(1.0, max_tokens=30 - 4 * i, ignore_eos=True))
                ended.append(i)

            async with asyncio.TaskGroup() as group:
                for i in range(6):
                    group.create_task(one(i))
            assert ended == list(range(6))

    asyncio.run(main())


@pytest.mark.parametrize("state", ["waiting", "prefilling", "running", "preempted"])
def test_a_cancelled_generation_leaves_nothing(tiny, monkeypatch, state):
    """Wherever it is, it ends with all that it has sampled, and others are not disturbed."""
    preempted = []
    true = Admission._preempt
    monkeypatch.setattr(Admission, "_preempt", lambda self, work: (preempted.append(work), true(self, work)))

    async def main():
        memory = {"preempted": (20 + 128 + 64) * TOKEN}.get(state)
        options = {"waiting": {"max_batch": 1}, "prefilling": {"prefill": 4}}.get(state, {})
        async with opened(tiny, memory=memory, debug=True, **options) as engine:
            graph, other = ThreadGraph(), ThreadGraph()
            start = await root(engine, graph)
            older = graph.add([Edge(0, len(start))], path=[0])
            long = Sampling(1.0, max_tokens=110, ignore_eos=True)
            first = asyncio.create_task(generate(engine, graph, older, long))
            await asyncio.sleep(0)
            node = await root(engine, other, "z" * 900 if state == "prefilling" else "a")
            stream = engine.generate(Request(other, node, long, chunk=1))
            count = 0
            if state in ("running", "preempted"):
                count += (await anext(stream)).count
            if state == "preempted":
                await until(lambda: preempted)
            if state == "prefilling":
                before = engine.load().computed_tokens
                await until(lambda: engine.load().computed_tokens >= before + 40)
            stream.cancel()
            deltas = [delta async for delta in stream]
            assert deltas[-1].finish_reason == "cancelled"
            count += sum(delta.count for delta in deltas)
            assert (count > 0) == (state in ("running", "preempted"))
            await engine.release(other)
            await check_integrity(engine)
            assert (await first).count == 110
            load = await quiet(engine)
            assert load.requests == 0
            # Under the limit there is no room for the older one's keys beside its slot when it ends: they are dropped.
            assert load.cached_tokens == len(start) + (0 if memory else 109)
            assert load.sampled_tokens == count + 110
            await engine.release(graph)
            assert engine.load().cached_bytes == 0

    asyncio.run(asyncio.wait_for(main(), 60))
    if state == "preempted":
        assert preempted


class TestSabotage:
    """Ways to break the limit; each must be noticed by the law."""

    def broken(self, folder, match, seeds=(3, 4, 5), **options):
        async def main():
            for seed in seeds:
                await limited(folder, seed, spare=64 * TOKEN, tokens=70, debug=False, prefill=512, **options)

        with pytest.raises((AssertionError, EngineError, ExceptionGroup), match=match):
            asyncio.run(main())

    @pytest.fixture(autouse=True)
    def _no_debug(self, monkeypatch):
        """The law itself must notice, not the checks between steps."""
        from orchestra.runtime.local.scheduler import Scheduler

        monkeypatch.setattr(Scheduler, "check_integrity", lambda self: None)

    def test_the_limit_is_soft(self, tiny, monkeypatch):
        true = Memory.left.fget
        monkeypatch.setattr(Memory, "left", property(lambda self: true(self) + 5000))
        self.broken(tiny, "bytes of keys and values; the limit is")

    def test_a_preempted_generation_loses_a_token(self, tiny, monkeypatch):
        true = Admission._preempt

        def forgetful(self, work):
            if isinstance(work, Job) and work.sampled > 2:
                work.state.tokens[-1] = work.state.tokens[-2]
            true(self, work)

        monkeypatch.setattr(Admission, "_preempt", forgetful)
        self.broken(tiny, "in one schedule and|scores differ")

    def test_what_is_pinned_is_evicted(self, tiny, monkeypatch):
        true = Cache.pin

        def loose(self, work):
            true(self, work)
            for state, _ in work.context:
                state.pinned = 0

        monkeypatch.setattr(Cache, "pin", loose)
        self.broken(tiny, "step failed|unhandled errors|in one schedule and|scores differ")
