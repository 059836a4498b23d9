"""ParScale streams in the in-process engine give what dense forwards of each stream, mixed by hand, give."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from engines import opened
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_folders import PREFIX, Dense, write

import orchestra
from orchestra.errors import CapabilityError, EngineError, UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.attention.plan import Plan
from orchestra.runtime.engine import Capability, Load, Sampling
from orchestra.runtime.local.model import load_model
from orchestra.runtime.local.sources import Source
from orchestra.runtime.local.streams import variants
from orchestra.testing import (
    check_conservation,
    check_greedy,
    check_no_leak,
    check_parity,
    check_schedule_invariance,
    random_graph,
)
from orchestra.testing.graphs import generate
from orchestra.testing.laws import row_logits

ODD = {"debug": True, "copy_bytes": 0, "prefill": 3, "max_batch": 2, "kernel": "reference"}
few = settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    """`checkpoint(streams, kind)` gives `(folder, oracle)` of a tiny ParScale model."""
    made = {}

    def make(streams: int, kind: str = "llama", **options) -> tuple[str, Dense]:
        key = f"{streams} {kind} {sorted(options.items())}"
        if key not in made:
            backbone = make_model(kind, **options)
            folder = write(tmp_path_factory.mktemp("parscale") / f"P{streams}", backbone, streams)
            made[key] = folder, Dense(backbone, folder)
        return made[key]

    return make


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory):
    """Folders with the streams of P = 2 and P = 4 on the tiny Llama, and nothing else."""
    place = tmp_path_factory.mktemp("sets")
    return [write(place / f"P{streams}", tiny, streams, whole=False) for streams in (2, 4)]


def parity(folder: str, model: Dense, seeds, **options) -> float:
    async def main() -> float:
        async with opened(folder, **options) as engine:
            worst = 0.0
            for seed in seeds:
                graph = await random_graph(engine, seed)
                worst = max(worst, await check_parity(engine, graph, model))
                await engine.release(graph)
            return worst

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_log_probabilities_are_those_of_the_dense_forward_of_each_stream(checkpoint, kind, forward):
    folder, dense = checkpoint(4, kind)
    parity(folder, dense, [1, 2], forward=forward)


@pytest.mark.parametrize("streams", [2, 8])
def test_any_number_of_streams_and_as_many_key_heads_as_heads(checkpoint, streams):
    folder, dense = checkpoint(streams, key_heads=4)
    parity(folder, dense, [3], **ODD)


def test_a_window_ends_what_a_token_sees_of_the_text_and_not_the_prefix(checkpoint):
    folder, dense = checkpoint(2, "mistral", sliding_window=6)
    parity(folder, dense, [1, 2])
    parity(folder, dense, [1], **ODD)


@given(st.integers(0, 10**6))
@few
def test_parity(checkpoint, seed):
    folder, dense = checkpoint(2)
    parity(folder, dense, [seed])
    parity(folder, dense, [seed], **ODD)


@pytest.mark.slow
@given(st.integers(0, 10**6))
@many
def test_parity_at_depth(checkpoint, seed):
    folder, dense = checkpoint(2)
    parity(folder, dense, [seed])
    parity(folder, dense, [seed], **ODD)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_model_class_says_the_same(checkpoint, kind):
    folder, _ = checkpoint(4, kind)

    async def main():
        async with opened(folder) as engine:
            model = engine.plain_model()
            assert type(model).__name__.endswith("ParScaleForCausalLM")
            graph = await random_graph(engine, 5)
            await check_parity(engine, graph, model)
            await check_greedy(engine, "a longer prompt, with the number 12", 24, model)

    asyncio.run(main())


def test_greedy_text_is_what_the_dense_forward_likes_best(checkpoint):
    folder, dense = checkpoint(4)

    async def main():
        async with opened(folder, prefill=3) as engine:
            graph = ThreadGraph()
            node = graph.add(spans=[await engine.encode_prompt("a longer prompt, with the number 12")])
            tokens = (await generate(engine, graph, node, Sampling(max_tokens=12, ignore_eos=True))).tokens
            return node.tokens[: -len(tokens)], tokens

    prompt, tokens = asyncio.run(main())
    logits = dense(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == tokens


def test_what_else_there_is_to_do_and_how_much_memory_changes_nothing(checkpoint):
    folder, _ = checkpoint(4)

    async def main():
        async with opened(folder, debug=True) as one, opened(folder, **ODD) as odd:
            token = one._open()[0].memory.token_bytes
            assert token == 4 * 2 * 2 * 2 * 8 * 4  # streams, keys and values, layers, key heads, dimension, float32
            assert await check_schedule_invariance([one, odd], 11, nodes=6, tokens=8) > 100

    asyncio.run(main())


def test_who_gives_way_for_want_of_memory_says_the_same(checkpoint):
    folder, dense = checkpoint(4)

    async def main(**limit):
        async with opened(folder, debug=True, **limit) as engine:
            graph = ThreadGraph()
            start = graph.add(spans=[await engine.encode_prompt("the same prompt for all of them")])
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(4)]
            warm = Sampling(1.0, max_tokens=90, ignore_eos=True)
            await asyncio.gather(*(generate(engine, graph, node, warm) for node in nodes))
            await check_parity(engine, graph, dense)
            return [node.tokens for node in nodes], engine.load()

    free, roomy = asyncio.run(main())
    limit = 512 * 4 * 2 * 2 * 2 * 8 * 4
    short, tight = asyncio.run(main(memory=limit))
    assert short == free
    assert tight.peak_bytes <= limit < roomy.peak_bytes
    assert tight.computed_tokens > roomy.computed_tokens  # some gave way, and were computed again


def test_nothing_is_left_behind_and_every_token_is_counted(checkpoint):
    folder, _ = checkpoint(2)

    async def main():
        async with opened(folder, debug=True) as engine:
            await check_no_leak(engine, 3)
            assert await check_conservation(engine, 4) > 10
            await engine.check_integrity()
            assert (engine.load().cached_bytes, engine.load().cached_tokens) == (0, 0)

    asyncio.run(main())


# -- several numbers of streams on one model ---------------------------------------------------------------------------


@orchestra.strategy
async def side_by_side(thread, tokens: int = 6, then: int = 4):
    """P = 1, 2 and 4 at the same time from one place; then each goes on with the next one's number."""
    numbers = [1, 2, 4]
    forks = thread.append(" so").fork([" one", " two", " four"])

    async def work(fork, first, second):
        first_part = await fork.generate(max_tokens=tokens, temperature=1.0, ignore_eos=True, streams=first)
        return (
            await first_part.append(" and")
            .using(streams=second)
            .generate(max_tokens=then, temperature=1.0, ignore_eos=True)
        )

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(fork, p, q)) for fork, p, q in zip(forks, numbers, [2, 4, 1], strict=True)]
    ended = [task.result() for task in tasks]
    return await thread.join(ended, " all of it:", how="reuse").generate(max_tokens=4, ignore_eos=True, streams=4)


def by_streams(graph, oracles) -> dict[int, int]:
    """Compare every sampled token with the oracle of its node's number of streams; how many were compared of each."""
    from orchestra.training.flatten import flatten

    row, compared = flatten(graph), dict.fromkeys(oracles, 0)
    tables = {p: row_logits(model, graph).log_softmax(-1) for p, model in oracles.items()}
    reported = {}
    for node in graph.nodes:
        index = 0
        for span in node.spans:
            for k, value in enumerate(span.logprobs, index):
                reported[node.id, k] = node.notes.get("streams", 1), value
            index += span.count
    for i, before in enumerate(row.predecessors):
        if (place := (row.nodes[i], row.indices[i])) in reported and before is not None:
            streams, value = reported[place]
            assert value == pytest.approx(float(tables[streams][before, row.tokens[i]]), abs=2e-3)
            compared[streams] += 1
            others = [float(tables[p][before, row.tokens[i]]) for p in tables if p != streams]
            assert all(abs(other - value) > 1e-6 for other in others), "the oracles do not tell them apart"
    return compared


def test_several_numbers_of_streams_run_side_by_side_on_one_model(tiny, sets):
    async def main():
        several = opened(tiny, streams=sets, debug=True, prefix_cache=10**6)
        async with several as engine, orchestra.connect(engine) as connection:
            # The same prompt again: what a run left must be found by its own number of streams only.
            outcomes = [await connection.run(side_by_side(), "the same prompt", seed=seed) for seed in (1, 2, 1)]
            await engine.check_integrity()
            assert engine.load().cached_tokens == 0
            assert engine.load().kept_tokens > 0
            return outcomes

    from orchestra.runtime.local.model import load_plain

    oracles = {
        1: load_plain(tiny),
        **{streams: Dense(tiny, folder) for streams, folder in zip((2, 4), sets, strict=True)},
    }
    outcomes = asyncio.run(main())
    for outcome in outcomes:
        assert by_streams(outcome.graph, oracles) == {1: 10, 2: 10, 4: 14}
    assert outcomes[0].text == outcomes[2].text
    assert outcomes[2].usage.cached_tokens > outcomes[0].usage.cached_tokens


def test_one_stream_is_the_plain_model(tiny, sets, checkpoint):
    async def sampled(engine, **settings):
        graph = ThreadGraph()
        node = graph.add(spans=[await engine.encode_prompt("a longer prompt, with the number 12")])
        delta = await generate(engine, graph, node, Sampling(1.0, max_tokens=30, ignore_eos=True, **settings))
        return delta.tokens, delta.logprobs, delta.notes

    async def main():
        async with opened(tiny) as plain, opened(tiny, streams=sets) as many, opened(checkpoint(2)[0]) as own:
            right = await sampled(plain)
            assert right[2] == {}
            for same in (await sampled(plain, streams=1), await sampled(many), await sampled(own, streams=1)):
                assert same == (right[0], pytest.approx(right[1], abs=1e-5), {})
            two = await sampled(own)
            assert two[0] != right[0]
            assert two[2] == {"streams": 2}
            assert await sampled(many, streams=2) == (two[0], pytest.approx(two[1], abs=1e-5), two[2])

    asyncio.run(main())


def test_a_text_is_scored_with_the_streams_of_its_thread(tiny, sets):
    scores = {}

    @orchestra.strategy
    async def scoring(thread):
        for streams in (None, 1, 2, 4):
            scores[streams] = await thread.using(streams=streams).score(" some text")
        return await thread.generate(max_tokens=1)

    async def main():
        async with opened(tiny, streams=sets) as engine, orchestra.connect(engine) as connection:
            return (await connection.run(scoring(), "the prompt")).graph

    graph = asyncio.run(main())
    from orchestra.runtime.local.model import load_plain

    oracles = [load_plain(tiny), load_plain(tiny), *(Dense(tiny, folder) for folder in sets)]
    for (streams, found), model in zip(scores.items(), oracles, strict=True):
        ids = graph.nodes[0].tokens + graph.nodes[1].tokens
        table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        right = [float(table[i - 1, ids[i]]) for i in range(len(ids) - len(found), len(ids))]
        assert found == pytest.approx(right, abs=1e-3), streams


# -- what cannot be, and how it ends -----------------------------------------------------------------------------------


async def outcome_of(engine, **settings):
    graph = ThreadGraph()
    node = graph.add(spans=[await engine.encode_prompt("so")])
    return await generate(engine, graph, node, Sampling(max_tokens=2, ignore_eos=True, **settings))


def test_a_number_that_is_not_there_is_refused_with_those_that_are(tiny, sets, checkpoint):
    async def main():
        async with opened(tiny, streams=sets) as many, opened(tiny) as plain, opened(checkpoint(8)[0]) as own:
            with pytest.raises(UsageError, match=r"has no 3 streams \(it has 1, 2, 4\); \?streams=DIR adds"):
                await outcome_of(many, streams=3)
            with pytest.raises(UsageError, match=r"has no 2 streams \(it has 1\)"):
                await outcome_of(plain, streams=2)
            with pytest.raises(UsageError, match=r"has no 4 streams \(it has 1, 8\)"):
                await outcome_of(own, streams=4)
            with pytest.raises(UsageError, match="has no 0 streams"):
                await outcome_of(plain, streams=0)
            assert many.load() == Load(0, 0, 0, 0, 0, 0, 0, 0) == own.load()

    asyncio.run(main())


def test_an_engine_without_streams_says_so():
    from orchestra.testing.scripted import ScriptedEngine

    class Plain(ScriptedEngine):
        capabilities = ScriptedEngine.capabilities - {Capability.STREAMS}

    async def main():
        async with orchestra.connect(Plain(lambda context, path: "so")) as connection:
            assert (await connection.run("sample", "x", streams=1)).text
            with pytest.raises(CapabilityError, match=r"cannot do streams.*local:PATH\?streams=DIR"):
                await connection.run("sample", "x", streams=2)

    asyncio.run(main())


def test_workers_of_a_concurrent_cache_have_no_streams(tiny, sets, checkpoint):
    spec = "hogwild(instruct=False, max_tokens=3, finish='')"

    async def main():
        async with opened(tiny, streams=sets) as engine, orchestra.connect(engine) as connection:
            await connection.run(spec, "x")
            with pytest.raises(CapabilityError, match="concurrent cache without streams only"):
                await connection.run(spec, "x", streams=2)
        async with opened(checkpoint(2)[0]) as engine, orchestra.connect(engine) as connection:
            await connection.run(spec, "x", streams=1)
            with pytest.raises(CapabilityError, match="concurrent cache without streams only"):
                await connection.run(spec, "x")

    asyncio.run(main())


def test_streams_that_are_not_for_the_model_are_refused_when_it_is_loaded(make_model, tiny, sets, tmp_path):
    async def said(folder, *others) -> str:
        with pytest.raises(UsageError) as error:
            async with opened(folder, streams=others):
                pass
        assert "\n" not in str(error.value)
        return str(error.value)

    async def main():
        twin = write(tmp_path / "twin", tiny, 2, whole=False)
        assert "both have 2 streams" in await said(tiny, *sets, twin)
        assert "is not a ParScale checkpoint" in await said(tiny, make_model("qwen2"))
        other = write(tmp_path / "other", make_model("llama", key_heads=1), 4, whole=False)
        assert "for this model they are (2, 4, 2, 5, 8)" in await said(tiny, other)
        assert "is 1" in await said(tiny, write(tmp_path / "one", tiny, 1))

    asyncio.run(main())


def test_a_checkpoint_of_one_stream_is_a_plain_model(tiny, tmp_path):
    folder = write(tmp_path / "one", tiny, 1)

    async def main():
        async with opened(folder) as one, opened(tiny) as plain:
            assert (await outcome_of(one)).tokens == (await outcome_of(plain)).tokens
            assert "streams" not in one.facts()

    asyncio.run(main())


@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_a_model_whose_streams_would_run_wrongly_is_refused(checkpoint, forward, monkeypatch):
    folder, _ = checkpoint(2)

    def load():
        model = load_model(folder, "float32", "cpu", forward=forward)
        assert (model.lean is not None) == (forward == "auto")
        return variants(model, Source(folder)).models[2].streams

    assert load().prefix == PREFIX
    monkeypatch.setattr("orchestra.runtime.local.model.mixed", lambda s, hidden: hidden[..., :: s.streams, :])
    with pytest.raises(UsageError, match="not those of a dense forward"):
        load()
    monkeypatch.undo()
    monkeypatch.setattr(Plan, "prefix", property(lambda plan: None, lambda plan, prefix: None), raising=False)
    with pytest.raises(UsageError, match="not those of a dense forward"):
        load()


def test_what_is_cancelled_fails_or_is_closed_ends_for_its_number_of_streams_alone(tiny, sets, monkeypatch):
    endless = {"max_tokens": 1500, "ignore_eos": True}

    async def start(engine, streams):
        from orchestra.runtime.engine import Request

        graph = ThreadGraph()
        node = graph.add(spans=[await engine.encode_prompt("so")])
        stream = engine.generate(Request(graph, node, Sampling(streams=streams, **endless), chunk=1))
        assert (await anext(stream)).count
        return graph, stream

    async def last(stream):
        return [delta async for delta in stream][-1].finish_reason

    async def main():
        async with opened(tiny, streams=sets) as engine:
            for stream in [(await start(engine, streams))[1] for streams in (1, 2, 4)]:
                stream.cancel()
                assert await last(stream) == "cancelled"
            (_, one), (graph, two), (_, four) = [await start(engine, streams) for streams in (1, 2, 4)]
            await engine.release(graph)
            assert await last(two) == "cancelled"
            broken = engine._open(4)[0]
            monkeypatch.setattr(broken, "memory", None)
            broken.streams = None
            with pytest.raises(EngineError, match="a step failed"):
                await last(four)
            assert (await anext(one)).count  # goes on
            await engine.close()
            assert await last(one) == "cancelled"
            with pytest.raises(EngineError, match="closed"):
                await start(engine, 2)

    asyncio.run(main())


# -- how they are named ------------------------------------------------------------------------------------------------


def test_a_url_adds_streams_to_a_model_and_the_facts_tell_them(tiny, sets, checkpoint):
    async def main(url):
        async with orchestra.connect(url) as connection:
            outcome = await connection.run("sample(max_tokens=3)", "x", streams=4)
            assert outcome.graph.nodes[-1].notes == {"streams": 4}
            return connection.engine.facts()

    own = asyncio.run(main(f"local:{checkpoint(4)[0]}"))
    added = asyncio.run(main(f"local:{tiny}?streams={','.join(sets)}"))
    assert (own["streams"], own["streams_known"]) == (4, [1, 4])
    assert (added["streams"], added["streams_known"]) == (1, [1, 2, 4])
    assert own["parameters"] == added["parameters"]
    fewer = asyncio.run(main(f"local:{tiny}?streams={sets[1]}"))
    plain = load_model(tiny, "float32", "cpu").fingerprint()
    assert len({own["fingerprint"], added["fingerprint"], plain}) == 3
    assert fewer["fingerprint"] == own["fingerprint"]  # the same streams on the same model


def test_a_published_checkpoint_is_loaded_without_its_code_and_without_a_word(checkpoint, capfd):
    folder, _ = checkpoint(2)
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["auto_map"]
    assert config["model_type"] == "llama_parscale"
    capfd.readouterr()
    load_model(folder, "float32", "cpu")
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_that_lacks_a_weight_of_the_model_is_refused(tiny, tmp_path):
    folder = write(tmp_path / "part", tiny, 2, whole=False)
    with pytest.raises(UsageError, match=r"lacks the tensor lm_head.weight and \d+ more"):
        load_model(folder, "float32", "cpu")
