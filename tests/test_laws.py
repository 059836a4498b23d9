"""The laws, on real models, with settings that take different ways through the engine."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from architectures import ARCHITECTURES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orchestra
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.local.model import load_plain
from orchestra.testing import (
    check_conservation,
    check_greedy,
    check_no_leak,
    check_parity,
    check_schedule_invariance,
    play,
    random_graph,
    random_program,
)
from orchestra.testing.graphs import Step, generate
from orchestra.testing.laws import row_logits
from orchestra.training.flatten import flatten

EMBEDDED = Path(orchestra.__file__).parent / "assets" / "embedded"

# Everything in place, tiny batches and chunks, no library kernel: as unlike the defaults as can be.
ODD = {"debug": True, "copy_bytes": 0, "prefill": 3, "max_batch": 2, "kernel": "reference"}
# One for each thing that a model may bring; the others are more of the same.
FAST = {
    "llama",
    "llama, a key head for each head",
    "llama, YaRN",
    "qwen2",
    "qwen3, windows",
    "mistral, window",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3, partial rotary, window",
    "cohere2",
    "glm4",
    "smollm3",
    "stablelm",
}
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@asynccontextmanager
async def opened(folder: str, **options):
    engine = LocalEngine(folder, **options)
    try:
        yield await engine.open()
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def plain(tiny):
    return load_plain(tiny)


def parity(folder: str, seeds, model=None, **options) -> float:
    async def main() -> float:
        async with opened(folder, **options) as engine:
            plain = engine.plain_model() if model is None else model
            worst = 0.0
            for seed in seeds:
                graph = await random_graph(engine, seed)
                worst = max(worst, await check_parity(engine, graph, plain))
                await engine.release(graph)
            return worst

    return asyncio.run(main())


@pytest.mark.parametrize(
    "name", [named if named in FAST else pytest.param(named, marks=pytest.mark.slow) for named in ARCHITECTURES]
)
def test_parity_and_greedy_text_over_architectures(make_model, name):
    async def main() -> None:
        kind, options = ARCHITECTURES[name]
        async with opened(make_model(kind, **options)) as engine:
            model = engine.plain_model()
            for seed in range(3):
                graph = await random_graph(engine, seed)
                await check_parity(engine, graph, model)
                await engine.release(graph)
            await check_greedy(engine, "a longer prompt, with the number 12", 24, model)

    asyncio.run(main())


def test_the_embedded_model_obeys_the_laws():
    async def main() -> None:
        async with opened(str(EMBEDDED)) as engine:
            model = engine.plain_model()
            words = [str(number) for number in range(100)]
            graph = await random_graph(engine, 5, words=words)
            await check_parity(engine, graph, model)
            await engine.release(graph)
            await check_greedy(engine, "numbers: 3 7 8 12 target: 54", 60, model)
            await check_no_leak(engine, 1, words=words)

    asyncio.run(main())


@given(st.integers(0, 10**6))
@few
def test_parity(tiny, plain, seed):
    parity(tiny, [seed], plain)
    parity(tiny, [seed], plain, **ODD)


@pytest.mark.slow
@given(st.integers(0, 10**6))
@many
def test_parity_at_depth(tiny, plain, seed):
    parity(tiny, [seed], plain)
    parity(tiny, [seed], plain, **ODD)


def test_random_programs_hold_what_the_laws_are_about():
    programs = [random_program(seed) for seed in range(20)]
    steps = [step for program in programs for step in program]
    assert any(len(step.parents) > 1 for step in steps), "reuse joins"
    assert any(step.appended for step in steps), "recompute joins"
    assert any(share < 1 for step in steps for _, share in step.parents), "cuts"
    assert any(not step.text and not step.appended for step in steps), "nodes that begin with a sampled token"
    assert any(step.sampling is None for step in steps), "nodes without a generation"


def test_greedy_text_equals_generate(tiny, plain):
    async def main() -> None:
        async with opened(tiny) as engine:
            for prompt in ("the answer is", "x", "a longer prompt, with the number 12"):
                await check_greedy(engine, prompt, 24, plain)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "mistral, window", "glm4"])
def test_bfloat16_is_at_most_twice_as_far_off_as_plain_attention(make_model, name):
    """Mean error of reported log-probabilities, against a float32 model with the same rounded weights."""
    kind, options = ARCHITECTURES[name]
    folder = make_model(kind, **options)

    async def main():
        async with opened(folder, dtype="bfloat16", copy_bytes=0) as engine:
            graph = ThreadGraph()
            start = graph.add(spans=[await engine.encode_prompt("the answer is")])
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(6)]
            warm = Sampling(1.0, max_tokens=40, ignore_eos=True)
            await asyncio.gather(*(generate(engine, graph, node, warm) for node in nodes))
            joined = graph.add([Edge(n.id, len(n)) for n in nodes], spans=[await engine.encode(" so")])
            await generate(engine, graph, joined, warm)
            return graph, engine.plain_model()

    graph, plain = asyncio.run(main())
    # Loaded in bfloat16, so that weights are rounded and rotary frequencies are not.
    exact = load_plain(folder, "bfloat16").float()
    row = flatten(graph)
    ours = {(n.id, len(n) - 40 + k): value for n in graph.nodes[1:] for k, value in enumerate(n.spans[-1].logprobs)}

    def of(model):
        table = row_logits(model, graph).log_softmax(-1)
        found = {}
        for i, before in enumerate(row.predecessors):
            if before is not None:
                found[row.nodes[i], row.indices[i]] = float(table[before, row.tokens[i]])
        return np.array([found[place] for place in ours])

    right = of(exact)
    assert np.abs(np.array(list(ours.values())) - right).mean() <= 2 * np.abs(of(plain) - right).mean()


def test_schedule_invariance(tiny):
    async def main() -> None:
        async with opened(tiny) as one, opened(tiny, **ODD) as other, opened(tiny, prefill=1) as third:
            assert await check_schedule_invariance([one, other, third], 11, nodes=6, tokens=8) > 100
            assert await check_schedule_invariance([one, other], 12) > 100

    asyncio.run(main())


@pytest.mark.slow
@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_schedule_invariance_at_depth(tiny, seed):
    async def main() -> None:
        async with opened(tiny) as one, opened(tiny, **ODD) as other:
            await check_schedule_invariance([one, other], seed, nodes=14)

    asyncio.run(main())


LITTLE = {"memory": 150_000, "debug": True}  # room for two generations or three


@pytest.mark.parametrize("options", [{}, ODD, LITTLE], ids=["default", "odd", "little-memory"])
def test_conservation_and_no_leak(tiny, options):
    async def main() -> None:
        async with opened(tiny, **options) as engine:
            for seed in range(4):
                assert await check_conservation(engine, seed) > 0
                await check_no_leak(engine, seed)
            load = engine.load()
            assert (load.requests, load.cached_tokens, load.cached_bytes) == (0, 0, 0)

    asyncio.run(main())


def test_little_memory_changes_no_result(tiny, plain):
    """Evicted keys and values are computed again (`test_memory_limit` says what holds besides)."""
    parity(tiny, range(5), plain, **LITTLE)


def test_what_is_shared_is_computed_once(tiny):
    """However many readers wait for it at the same time."""

    async def main() -> None:
        async with opened(tiny) as engine:
            text = " ".join("abcdefgh" * 4)
            program = [
                Step(text=text),
                *(Step(((0, 1.0),), sampling=Sampling(1.0, max_tokens=5, ignore_eos=True)),) * 8,
            ]
            played = await play(engine, program)
            prompt = len(played.nodes[0])
            # The last sampled token of a node is computed only when somebody needs it.
            assert engine.load().computed_tokens == prompt + 8 * 4
            assert engine.load().cached_tokens == prompt + 8 * 4

    asyncio.run(main())


class Sabotage:
    """Ways to break the engine; each must be noticed by a law."""

    @staticmethod
    def position(monkeypatch):
        from orchestra.runtime.local.pack import Pack

        true = Pack.add_fill

        def broken(self, state, context, take):
            true(self, state, context, take)
            self._positions[-1] = self._positions[-1] + 1

        monkeypatch.setattr(Pack, "add_fill", broken)

    @staticmethod
    def segment(monkeypatch):
        from orchestra.runtime.local.pack import Pack

        true = Pack.groups
        monkeypatch.setattr(Pack, "groups", lambda self: true(self)[1:])

    @staticmethod
    def cut(monkeypatch):
        """Reads the whole of a parent, where the edge takes a part."""
        from orchestra.graph import ThreadGraph as Graph

        true = Graph.view

        def broken(self, context):
            return {i: max(n, len(self.nodes[i])) for i, n in true(self, context).items()}

        monkeypatch.setattr(Graph, "view", broken)

    @staticmethod
    def mask(monkeypatch):
        """Tails see one column of padding."""
        from orchestra.runtime.attention import plan

        true = plan.Tails.over.__func__

        def broken(cls, *arguments):
            tails = true(cls, *arguments)
            if tails.mask is not None:  # else all slots are equally long
                tails.mask[..., 1:] = tails.mask[..., :-1].clone()
            return tails

        monkeypatch.setattr(plan.Tails, "over", classmethod(broken))

    @staticmethod
    def merge(monkeypatch):
        """Parts are averaged instead of weighed."""
        from orchestra.runtime.attention.plan import Reads

        true = Reads.run

        def broken(self, *arguments):
            true(self, *arguments)
            return self.outs.mean(0) if self.outs is not None else true(self, *arguments)

        monkeypatch.setattr(Reads, "run", broken)

    @staticmethod
    def window(monkeypatch):
        """Windows are one position too wide."""
        from orchestra.runtime.attention.plan import Plan

        true = Plan.run

        def broken(self, *arguments, window=None, softcap=None):
            return true(self, *arguments, window=window and window + 1, softcap=softcap)

        monkeypatch.setattr(Plan, "run", broken)

    @staticmethod
    def softcap(monkeypatch):
        from orchestra.runtime.attention.plan import Plan

        true = Plan.run
        monkeypatch.setattr(
            Plan, "run", lambda self, *arguments, window, softcap: true(self, *arguments, window=window)
        )


@pytest.fixture
def unchecked(monkeypatch):
    """Models are not compared with themselves when they are loaded, which would notice some sabotage before a law."""
    monkeypatch.setattr("orchestra.runtime.local.model.probe", lambda model: model.module.config.model_type != "llama")


@pytest.mark.parametrize(
    ("name", "way"),
    [("mistral, window", "window"), ("gemma3_text", "window"), ("qwen3, windows", "window"), ("gemma2", "softcap")],
)
def test_parity_notices_sabotage_of_windows_and_soft_capping(make_model, monkeypatch, unchecked, name, way):
    kind, options = ARCHITECTURES[name]
    getattr(Sabotage, way)(monkeypatch)
    with pytest.raises(AssertionError, match=r"one forward gives"):
        parity(make_model(kind, **options), range(6))


@pytest.mark.parametrize("way", ["position", "segment", "mask", "merge"])
def test_parity_notices_sabotage(tiny, plain, monkeypatch, unchecked, way):
    getattr(Sabotage, way)(monkeypatch)
    with pytest.raises(AssertionError, match=r"one forward gives"):
        parity(tiny, range(6), plain, copy_bytes=0)


def test_parity_notices_a_cut_that_is_not_one(tiny, plain, monkeypatch):
    async def main() -> None:
        async with opened(tiny) as engine:
            for seed in range(12):
                with monkeypatch.context() as patch:
                    Sabotage.cut(patch)
                    graph = await random_graph(engine, seed)
                await check_parity(engine, graph, plain, scores=False)

    with pytest.raises(AssertionError, match=r"one forward gives"):
        asyncio.run(main())


def test_schedule_invariance_notices_noise_that_depends_on_the_batch(tiny, monkeypatch):
    from orchestra.runtime.local import sampler

    true = sampler.gumbel
    monkeypatch.setattr(sampler, "gumbel", lambda keys, at, n: true(keys, at + len(keys), n))

    async def main() -> None:
        async with opened(tiny) as engine:
            await check_schedule_invariance([engine], 11, temperature=1.0)

    with pytest.raises(AssertionError, match="in one schedule and"):
        asyncio.run(main())


def test_no_leak_and_conservation_notice_sabotage(tiny, monkeypatch):
    from orchestra.runtime.local.cache import Cache
    from orchestra.runtime.local.jobs import Job

    async def main(law) -> None:
        async with opened(tiny) as engine:
            for seed in range(3):
                await law(engine, seed)

    with monkeypatch.context() as patch:
        patch.setattr(Cache, "drop", lambda self, state: None)
        with pytest.raises(AssertionError, match="left behind"):
            asyncio.run(main(check_no_leak))
    true = Job.finish

    def forgets(self, reason, *rest):
        delta = true(self, reason, *rest)
        if reason == "cancelled":
            delta.count = 0
        return delta

    with monkeypatch.context() as patch:
        patch.setattr(Job, "finish", forgets)
        with pytest.raises(AssertionError, match="the deltas hold"):
            asyncio.run(main(check_conservation))


def test_greedy_law_notices_a_wrong_token(tiny, monkeypatch):
    from orchestra.runtime.local.sampler import Batch

    true = Batch.draw

    def broken(self, logits, positions, counts=()):
        return true(self, logits.roll(1, -1) if int(positions[0]) == 20 else logits, positions)

    monkeypatch.setattr(Batch, "draw", broken)

    async def main() -> None:
        async with opened(tiny) as engine:
            await check_greedy(engine, "the answer is", 24)

    with pytest.raises(AssertionError, match="greedy text differs"):
        asyncio.run(main())


def test_parity_needs_something_to_compare(tiny, plain):
    async def main() -> None:
        async with opened(tiny) as engine:
            await check_parity(engine, ThreadGraph(), plain)

    with pytest.raises(AssertionError, match="nothing to compare"):
        asyncio.run(main())
