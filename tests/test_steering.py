"""Penalties and bias: against formulas written here, transformers' processor, and exact enumeration."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import opened, root
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.errors import EngineError, UsageError
from orchestra.graph import Edge, Span, ThreadGraph
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.model import load_plain
from orchestra.runtime.local.sampler import Batch, gumbel, gumbel_of, kept, noise_key
from orchestra.runtime.local.steering import Steering
from orchestra.testing import check_parity, check_schedule_invariance
from orchestra.testing.graphs import generate


def penalised(logits: list[float], before: list[int], sampling: Sampling) -> list[float]:
    """The formula, token by token."""
    found = []
    for token, logit in enumerate(logits):
        times = before.count(token)
        if times:
            logit -= sampling.frequency_penalty * times + sampling.presence_penalty
            logit = logit / sampling.repetition_penalty if logit > 0 else logit * sampling.repetition_penalty
        found.append(logit + dict(sampling.logit_bias).get(token, 0.0))
    return found


@settings(deadline=None, max_examples=100)
@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=6, max_size=6),
    before=st.lists(st.integers(0, 5), max_size=12),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    repetition=st.floats(0.5, 2),
    bias=st.dictionaries(st.integers(0, 5), st.one_of(st.floats(-5, 5), st.just(-math.inf))),
)
def test_logits_change_by_the_formula(logits, before, frequency, presence, repetition, bias):
    sampling = Sampling(
        frequency_penalty=frequency,
        presence_penalty=presence,
        repetition_penalty=repetition,
        logit_bias=tuple(bias.items()),
    )
    steering = Steering(sampling)
    given_logits = np.array(logits, np.float32)
    for token in before:
        assert not steering.accept(token)
    changed = steering.apply(given_logits)
    assert np.allclose(changed, penalised(logits, before, sampling), atol=1e-4)
    assert np.array_equal(given_logits, np.array(logits, np.float32))


def following(plain, ids: list[int]) -> list[float]:
    with torch.no_grad():
        return plain(torch.tensor([ids])).logits[0, -1].tolist()


LETTERS = [69, 70, 71, 72]


def test_greedy_text_is_that_of_transformers_with_its_repetition_penalty(tiny):
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            sampling = Sampling(max_tokens=24, ignore_eos=True, repetition_penalty=1.7)
            said = await generate(engine, graph, graph.add([Edge(0, len(start))]), sampling)
            without = await generate(
                engine, graph, graph.add([Edge(0, len(start))]), replace(sampling, repetition_penalty=1.0)
            )
            await check_parity(engine, graph)  # reported log-probabilities are the model's own
            return start.tokens, said.tokens, without.tokens

    prompt, said, without = asyncio.run(main())
    processor = RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=len(prompt))
    expected = load_plain(tiny).generate(
        torch.tensor([prompt]),
        logits_processor=LogitsProcessorList([processor]),
        max_new_tokens=24,
        min_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )[0, len(prompt) :]
    assert said == expected.tolist()
    assert said != without


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_three_tokens_follow_the_law(tiny, temperature):
    """All strings of three tokens over four letters, enumerated with the plain model and the formula above."""
    n = 1200
    sampling = Sampling(
        temperature,
        max_tokens=3,
        ignore_eos=True,
        frequency_penalty=0.8,
        presence_penalty=-0.5,
        repetition_penalty=1.3,
        logit_bias=tuple(
            (token, 1.5 if token == 70 else 0.0 if token in LETTERS else -math.inf) for token in range(267)
        ),
    )

    async def main():
        async with opened(tiny, max_batch=256) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph, "abc")
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(n)]
            deltas = await asyncio.gather(*(generate(engine, graph, node, sampling, seed=5) for node in nodes))
            return start.tokens, [tuple(delta.tokens) for delta in deltas]

    prompt, drawn = asyncio.run(main())
    plain = load_plain(tiny)

    def law(own: list[int]) -> dict[tuple[int, ...], float]:
        if len(own) == 3:
            return {tuple(own): 1.0}
        logits = penalised(following(plain, prompt + own), own, sampling)
        weights = {token: math.exp(logits[token] / temperature) for token in LETTERS}
        total = sum(weights.values())
        return {s: w / total * p for token, w in weights.items() for s, p in law([*own, token]).items()}

    expected = law([])
    assert set(drawn) <= set(expected)
    frequent = [s for s, p in expected.items() if n * p >= 5]
    found = [drawn.count(s) for s in frequent] + [sum(s not in frequent for s in drawn)]
    wanted = [n * expected[s] for s in frequent]
    wanted.append(n - sum(wanted))
    statistic = sum((a - b) ** 2 / b for a, b in zip(found, wanted, strict=True) if b > 0)
    freedom = len(frequent)
    assert len(frequent) > 8
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8  # passed by chance less than once in 10,000 times


def test_a_generation_counts_what_it_has_sampled_itself(tiny):
    """As a server does that gets the path as its prompt: no matter how that path came about."""

    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            sampling = Sampling(max_tokens=8, ignore_eos=True, frequency_penalty=2.0, presence_penalty=1.0)
            first = graph.add([Edge(0, len(start))])
            before = (await generate(engine, graph, first, sampling)).tokens
            rest = await generate(engine, graph, graph.add([Edge(1, len(first))]), sampling)
            forced = graph.add([Edge(0, len(start))], spans=[Span("forced", before, len(before), "")])
            assert (await generate(engine, graph, forced, sampling)).tokens == rest.tokens
            prompt = ThreadGraph()
            ids = [*start.tokens, *before]
            whole = prompt.add(spans=[Span("prompt", ids, len(ids), "")])
            assert (await generate(engine, prompt, whole, sampling)).tokens == rest.tokens

    asyncio.run(main())


STEERED = (
    {},
    {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    {"repetition_penalty": 1.5, "logit_bias": ((72, 2.0), (73, -math.inf))},
    {"regex": "[a-z ]+(the|in)+[0-9]*", "top_p": 0.9},
    {"json_schema": '{"type": "array", "items": {"type": "integer"}}', "frequency_penalty": 0.5},
)


@pytest.mark.parametrize("seed", range(3))
def test_steered_generations_do_not_depend_on_the_schedule(tiny, seed):
    async def main():
        async with opened(tiny) as one, opened(tiny, max_batch=2, prefill=8, copy_bytes=0) as other:
            return await check_schedule_invariance([one, other], seed, settings=STEERED)

    assert asyncio.run(main()) > 100


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([7, 1500, 4000]),
    spread=st.sampled_from([0.3, 2.0, 9.0]),
    ties=st.booleans(),
    sampling=st.builds(
        Sampling,
        top_k=st.sampled_from([0, 1, 5, 100, 5000]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.4, 1e-6]),
        min_p=st.sampled_from([0.0, 0.01, 0.3]),
    ),
)
def test_truncation_is_that_of_the_whole_sorted_row(seed, size, spread, ties, sampling):
    scores = (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)
    if ties:
        scores = scores.round()
    order = sorted(range(size), key=lambda i: (-scores[i], i))[: sampling.top_k or None]
    chances = np.exp(scores[order].astype(np.float64) - scores[order[0]])
    if sampling.top_p < 1:
        reached = np.cumsum(chances / chances.sum())
        margin = np.abs(reached - sampling.top_p).min()
        if margin < 1e-12:
            return  # rounding decides
        order = order[: 1 + int((reached < sampling.top_p).sum())]
    expected = [i for i, chance in zip(order, chances, strict=False) if chance >= sampling.min_p]
    if sampling != Sampling():
        assert kept(scores, sampling).tolist() == sorted(expected)


def test_noise_of_some_entries_is_that_of_the_row():
    keys = np.array([noise_key(1, (i,)) for i in range(3)], np.uint64)
    positions = np.array([5, 900, 0])
    ids = [np.array([0, 7, 49_999]), np.array([], np.int64), np.arange(50_000)]
    rows = gumbel(keys, positions, 50_000)
    for row, some, noise in zip(rows, ids, gumbel_of(keys, positions, ids), strict=True):
        assert np.array_equal(row[some], noise)


def test_rows_that_ask_for_nothing_are_drawn_as_before():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.standard_normal((6, 50)).astype(np.float32))
    plain = [Sampling(1.0), Sampling(), Sampling(0.5, top_k=3)] * 2
    alone = Batch(plain, range(6)).draw(logits, np.arange(6))
    steered = Sampling(1.0, logit_bias=((3, 50.0),))
    mixed = Batch([*plain, steered], range(7), [*[None] * 6, Steering(steered)])
    drawn = mixed.draw(torch.cat([logits, logits[:1]]), np.arange(7))
    assert drawn.tokens == [*alone.tokens, 3]
    assert drawn.logprobs[:6] == alone.logprobs
    assert drawn.logprobs[6] == pytest.approx(float(logits[0].log_softmax(-1)[3]))  # the model's own


def test_when_no_token_is_left_that_generation_fails_and_the_others_go_on(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph)
            plain = Sampling(0.8, max_tokens=6, ignore_eos=True)
            everything = tuple((token, -math.inf) for token in range(267))
            digits = tuple((token, -math.inf) for token in range(19, 29))
            wanted = [
                plain,
                replace(plain, logit_bias=everything),
                replace(plain, logit_bias=digits, regex="[ab]{3}[0-9]"),
                plain,
            ]
            nodes = [graph.add([Edge(0, len(start))], path=[0]) for _ in wanted]
            said = await asyncio.gather(
                *(generate(engine, graph, node, s) for node, s in zip(nodes, wanted, strict=True)),
                return_exceptions=True,
            )
            assert said[0].tokens == said[3].tokens
            assert said[0].count == 6
            assert isinstance(said[1], EngineError)
            assert "no token is left to go on with: logit_bias bans every token" in str(said[1])
            assert "the grammar allows no token" in str(said[2])
            assert engine.load().sampled_tokens == 6 + 6 + 3
            await engine.release(graph)
            assert engine.load().cached_bytes == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"logit_bias": ((1, math.inf),)},
        {"logit_bias": ((1, math.nan),)},
        {"logit_bias": ((267, 1.0),)},
        {"logit_bias": ((-1, 1.0),)},
    ],
)
def test_impossible_settings_are_refused(tiny, wrong):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            await generate(engine, graph, await root(engine, graph), Sampling(**wrong))

    with pytest.raises(UsageError, match=next(iter(wrong))):
        asyncio.run(main())
