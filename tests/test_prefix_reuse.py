"""Runs share the keys and values of equal beginnings, and of nothing else."""

from __future__ import annotations

import asyncio
import time

import pytest
from engines import WARM, opened, quiet, root, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Request, Sampling
from orchestra.runtime.local import engine as local
from orchestra.runtime.local import radix
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.local.model import load_plain
from orchestra.testing import (
    check_integrity,
    check_joined_cache_is_not_found,
    check_no_leak,
    check_parity,
    check_prefix_reuse,
)
from orchestra.testing.graphs import generate

few = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def plain(tiny):
    return load_plain(tiny)


def laws(folder, plain, seed, **options):
    async def main():
        async with opened(folder, debug=True, **options) as engine:
            found = await check_prefix_reuse(engine, seed, model=plain)
            assert await check_joined_cache_is_not_found(engine, seed, model=plain) >= 4
            return found

    return asyncio.run(main())


@given(st.integers(0, 10**6))
@few
def test_a_run_computes_what_is_new_and_no_join_is_found(tiny, plain, seed):
    assert laws(tiny, plain, seed) > 0


@pytest.mark.slow
@given(st.integers(0, 10**6))
@many
def test_reuse_at_depth(tiny, plain, seed):
    laws(tiny, plain, seed)
    laws(tiny, plain, seed, prefill=5, max_batch=2, copy_bytes=0)
    laws(tiny, plain, seed, prefix_cache=PLENTY)


@given(st.integers(0, 10**6))
@few
def test_what_ended_runs_left_is_found(tiny, plain, seed):
    async def main():
        async with opened(tiny, debug=True, prefix_cache=PLENTY) as engine:
            assert await check_prefix_reuse(engine, seed, released=True, model=plain) > 0
            await check_joined_cache_is_not_found(engine, seed + 1, model=plain)
            await check_no_leak(engine, seed)

    asyncio.run(main())


@pytest.mark.parametrize("together", [True, False])
def test_sixteen_runs_compute_one_prompt(tiny, together):
    async def main():
        async with opened(tiny, debug=True) as engine:

            async def one(seed):
                graph = ThreadGraph()
                start = await root(engine, graph, "x" * 999)
                node = graph.add([Edge(0, len(start))])
                delta = await generate(engine, graph, node, WARM, seed=seed)
                return graph, delta

            if together:
                results = await asyncio.gather(*(one(seed) for seed in range(16)))
            else:
                results = [await one(seed) for seed in range(16)]
                assert [delta.cached_tokens for _, delta in results] == [0] + [1000] * 15
            load = engine.load()
            assert load.computed_tokens == load.cached_tokens == 1000 + 16 * 7
            token = engine._open()[0].memory.token_bytes
            assert (await quiet(engine)).cached_bytes == (1000 + 16 * 8) * token
            assert len({tuple(delta.tokens) for _, delta in results}) == 16
            for graph, _ in results[::-1]:
                await engine.release(graph)
            assert engine.load().cached_bytes == 0

    asyncio.run(main())


def test_two_runs_go_on_when_the_one_that_they_share_with_ends(tiny, plain):
    """The first run ends in the middle of the others' generations, and a cancelled prefill is taken over."""

    async def main():
        async with opened(tiny, debug=True, prefill=16) as engine:
            first, second = ThreadGraph(), ThreadGraph()
            node = await root(engine, first, "y" * 300)
            stream = engine.generate(Request(first, node, Sampling(ignore_eos=True), chunk=1))
            start = await root(engine, second, "y" * 250)
            child = second.add([Edge(0, len(start))])
            other = asyncio.create_task(generate(engine, second, child, Sampling(max_tokens=60, ignore_eos=True)))
            await until(lambda: engine.load().computed_tokens >= 100)  # some of the prompt, not all
            stream.cancel()
            await engine.release(first)
            assert (await other).count == 60
            assert (await quiet(engine)).cached_tokens == 251 + 59
            await check_parity(engine, second, plain)
            await engine.release(second)
            assert engine.load().cached_bytes == 0

    asyncio.run(main())


def test_what_is_kept_is_told_apart_and_has_a_limit(tiny):
    async def main():
        async with opened(tiny, debug=True) as engine:
            token = engine._open()[0].memory.token_bytes
        async with opened(tiny, debug=True, prefix_cache=250 * token) as engine:

            async def run(letter, length=99):
                graph = ThreadGraph()
                start = await root(engine, graph, letter * length)
                delta = await generate(engine, graph, graph.add([Edge(0, len(start))]), Sampling(max_tokens=1))
                held = engine.load()
                assert (held.cached_tokens, held.kept_bytes <= 250 * token) == (length + 1, True)
                await engine.release(graph)
                return delta.cached_tokens

            assert await run("p") == 0
            load = engine.load()
            assert (load.cached_tokens, load.cached_bytes) == (0, 0)
            assert (load.kept_tokens, load.kept_bytes) == (100, 100 * token)
            assert await run("q") == 1  # every prompt begins with the same special token
            assert await run("p") == 100  # now the other is the oldest, and has to go for the next
            assert await run("r") == 1
            assert [await run("q"), await run("r"), await run("p")] == [1, 100, 1]
            assert await run("r", 49) == 50  # a part of it: the rest stays
            assert await run("r") == 100

    asyncio.run(main())


def test_nothing_is_kept_unless_asked_for(tiny):
    async def main():
        async with opened(tiny) as engine:
            for _ in range(2):
                graph = ThreadGraph()
                start = await root(engine, graph)
                child = graph.add([Edge(0, len(start))])
                assert (await generate(engine, graph, child, WARM)).cached_tokens == 0
                await engine.release(graph)
                assert engine.load().kept_bytes == engine.load().cached_bytes == 0
        with pytest.raises(UsageError, match="prefix_cache is a number of bytes"):
            LocalEngine(tiny, prefix_cache=-1)

    asyncio.run(main())


def test_the_tree_of_a_long_thread_stays_fast(tiny):
    """A thread that grows by single tokens is a chain of nodes: coming to know it is not a search of all of it."""

    async def main():
        async with opened(tiny) as engine:
            token = Sampling(max_tokens=1, ignore_eos=True)
            for _ in range(2):
                graph = ThreadGraph()
                node = await root(engine, graph)
                began = time.perf_counter()
                for _ in range(150):
                    node = graph.add([Edge(node.id, len(node))])
                    await generate(engine, graph, node, token)
                assert time.perf_counter() - began < 20

    asyncio.run(main())


class TestSabotage:
    """Ways to break the sharing; each must be noticed by a law."""

    def broken(self, folder, plain, law, match, seeds=range(6), **options):
        async def main():
            async with opened(folder, **options) as engine:
                for seed in seeds:
                    await law(engine, seed, model=plain)

        with pytest.raises(AssertionError, match=match):
            asyncio.run(main())

    def test_nothing_is_found(self, tiny, plain, monkeypatch):
        monkeypatch.setattr(radix, "match", lambda *_: radix.Match([], 0))
        self.broken(tiny, plain, check_prefix_reuse, "0 tokens were found, of")

    def test_what_began_without_a_token_is_not_found(self, tiny, plain, monkeypatch):
        monkeypatch.setattr(radix, "_file", lambda children: None)
        self.broken(tiny, plain, check_prefix_reuse, "tokens were found, of")

    def test_more_is_found_than_there_is(self, tiny, plain, monkeypatch):
        true = radix._common

        def generous(one, i, other, j):
            same = true(one, i, other, j)
            return min(len(one) - i, len(other) - j, same + 1) if same else 0

        monkeypatch.setattr(radix, "_common", generous)
        self.broken(tiny, plain, check_prefix_reuse, "no causal path shares more than|one forward gives")

    def test_a_joined_cache_is_found(self, tiny, plain, monkeypatch):
        true = local.snapshot

        def plainly(node, view, tokens):
            seen = true(node, view, tokens)
            seen.joined = False
            seen.parent = seen.parent or (node.context[0] if node.context else None)
            return seen

        monkeypatch.setattr(local, "snapshot", plainly)
        self.broken(tiny, plain, check_joined_cache_is_not_found, "no causal path shares more than|one forward gives")

    def test_the_books_are_wrong(self, tiny, monkeypatch):
        """`check_integrity` compares what is counted with what is there."""
        from orchestra.runtime.local.cache import Cache

        async def main(breaks, match):
            async with opened(tiny) as engine:
                graph = ThreadGraph()
                start = await root(engine, graph)
                child = graph.add([Edge(0, len(start))])
                await generate(engine, graph, child, WARM)
                await quiet(engine)
                await check_integrity(engine)
                breaks(engine._open()[2]._scheduler.cache)
                with pytest.raises(AssertionError, match=match):
                    await check_integrity(engine)

        def state(cache: Cache):
            return next(iter(cache.sealed))

        for breaks, match in [
            (lambda cache: setattr(cache, "tokens", cache.tokens + 1), "tokens are counted"),
            (lambda cache: setattr(cache.memory, "bytes", cache.memory.bytes - 1), "bytes are counted"),
            (lambda cache: setattr(state(cache), "readers", 1), "readers of 0"),
            (lambda cache: setattr(state(cache), "pinned", 1), "pins of 0"),
            (lambda cache: setattr(state(cache), "computed", 9**9), "more keys than tokens|tokens are counted"),
            (lambda cache: state(cache).holders.clear(), "kept and held, or neither"),
            (lambda cache: state(cache).tokens.__setitem__(0, 9), "filed under another token"),
            (lambda cache: setattr(state(cache), "start", 3), "starts elsewhere"),
            (lambda cache: cache.sealed.clear(), "stretches with segments"),
        ]:
            asyncio.run(main(breaks, match))
