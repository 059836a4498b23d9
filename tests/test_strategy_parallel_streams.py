"""parallel_streams: every generation of what it runs is computed in its number of streams, and nothing else changes."""

from __future__ import annotations

import asyncio

import pytest
from stream_folders import write

import orchestra
from orchestra.errors import CapabilityError, SpecError, UsageError
from orchestra.runtime.engine import Capability
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy


@pytest.fixture(scope="module")
def url(tiny, tmp_path_factory):
    """A plain model with the streams of P = 2 and P = 4."""
    place = tmp_path_factory.mktemp("sets")
    folders = [write(place / f"P{streams}", tiny, streams, whole=False) for streams in (2, 4)]
    return f"local:{tiny}?streams={','.join(folders)}"


def run(url, spec, **settings):
    async def main():
        async with orchestra.connect(url) as connection:
            return await connection.run(spec, "x", **{"max_tokens": 6, "ignore_eos": True} | settings)

    return asyncio.run(main())


def numbers(outcome) -> list[int]:
    sampled = [node for node in outcome.graph.nodes if node.count("sampled")]
    return [node.notes.get("streams", 1) for node in sampled]


def test_it_says_what_its_drafts_say_in_so_many_streams(url):
    texts = {}
    for streams in (1, 2, 4):
        outcome = run(url, f"parallel_streams(streams={streams})")
        texts[streams] = outcome.text
        assert numbers(outcome) == [streams]
        assert outcome.text == run(url, "sample", streams=streams).text
        assert outcome.usage.sampled_tokens == outcome.usage.critical_path_tokens == 6
    assert len(set(texts.values())) == 3
    assert run(url, "sample").text == texts[1]


def test_streams_flow_through_nested_strategies_and_the_innermost_number_counts(url):
    assert numbers(run(url, "parallel_streams(streams=2, drafts=self_consistency(samples=3))")) == [2, 2, 2]
    assert numbers(run(url, "self_consistency(samples=2, drafts=parallel_streams(streams=2))")) == [2, 2]
    assert numbers(run(url, "parallel_streams(streams=2, drafts=parallel_streams(streams=4))")) == [4]
    assert numbers(run(url, "parallel_streams(streams=2)", streams=4)) == [2]
    beams = numbers(run(url, "parallel_streams(streams=2, drafts=beam_search(width=2))"))
    assert beams
    assert set(beams) == {2}
    particles = run(url, "parallel_streams(streams=2, drafts=power_smc(particles=3, alpha=2))", ignore_eos=None)
    assert set(numbers(particles)) == {2}  # in lock-step
    outcome = run(url, "pdr(widths=[2], k=1, distiller='random_k', drafts=parallel_streams(streams=4))")
    assert set(numbers(outcome)) == {4}


def test_a_budget_leaves_what_the_drafts_would_choose_by_then(url):
    spec = "parallel_streams(streams=2, drafts=self_consistency(samples=3))"
    outcome = run(url, spec, budget="sampled_tokens=14")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.text
    assert len(outcome.candidates) >= 2
    assert run(url, "parallel_streams(streams=2)", budget="sampled_tokens=4").text


def test_the_laws_of_strategies_hold(url):
    async def main(spec):
        async with orchestra.connect(url) as connection:
            await check_strategy(connection.engine, spec, "x", max_tokens=8, temperature=1.0, ignore_eos=True)

    asyncio.run(main("parallel_streams(streams=4)"))
    asyncio.run(main("best_of(samples=2, drafts=parallel_streams(streams=2))"))


def test_who_has_no_streams_is_refused_before_anything_is_generated(tiny):
    class Plain(ScriptedEngine):
        capabilities = ScriptedEngine.capabilities - {Capability.STREAMS}

    with pytest.raises(CapabilityError, match=r"parallel_streams needs streams, which .* cannot; local:PATH can"):
        run(Plain(lambda context, path: "so"), "parallel_streams")
    with pytest.raises(UsageError, match=r"has no 4 streams \(it has 1\); \?streams=DIR"):
        run(f"local:{tiny}", "parallel_streams")
    with pytest.raises(SpecError, match="streams"):
        run(f"local:{tiny}", "parallel_streams(streams=0)")
