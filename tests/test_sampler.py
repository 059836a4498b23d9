from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from conftest import save_model
from engines import opened, root

from orchestra.errors import UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.model import load_plain
from orchestra.runtime.local.sampler import Batch, gumbel, kept, noise_key
from orchestra.testing import check_parity
from orchestra.testing.graphs import generate


def draws(sampling: Sampling, logits: list[float], n: int = 20_000) -> np.ndarray:
    """Frequencies of tokens over positions."""
    batch = Batch([sampling] * n, [noise_key(3, (i % 7,)) for i in range(n)])
    tokens = batch.draw(torch.tensor([logits] * n), np.arange(n)).tokens
    return np.bincount(tokens, minlength=len(logits)) / n


def chi_square(found: np.ndarray, expected: np.ndarray, n: int) -> float:
    used = expected > 0
    assert not found[~used].any()
    return float((n * (found[used] - expected[used]) ** 2 / expected[used]).sum())


CHANCES = np.array([0.1, 0.5, 0.04, 0.2, 0.16])


@pytest.mark.parametrize(
    ("sampling", "law"),
    [
        (Sampling(1.0), CHANCES),
        (Sampling(0.5), CHANCES**2),
        (Sampling(2.0), CHANCES**0.5),
        (Sampling(1.0, top_k=2), CHANCES * (CHANCES >= 0.2)),
        (Sampling(1.0, top_p=0.75), CHANCES * (CHANCES >= 0.16)),  # 0.5 + 0.2 < 0.75: the third one crosses
        (Sampling(1.0, min_p=0.3), CHANCES * (CHANCES >= 0.15)),
        (Sampling(0.5, top_k=4, top_p=0.99), CHANCES**2 * (CHANCES >= 0.1)),
    ],
)
def test_drawn_tokens_follow_the_softmax(sampling, law):
    n = 20_000
    found = draws(sampling, np.log(CHANCES).tolist(), n)
    # 4 degrees of freedom: 23.5 is passed by chance once in 10,000 times.
    assert chi_square(found, law / law.sum(), n) < 23.5


def test_noise_is_gumbel_and_independent_of_the_rows_around_it():
    keys = np.array([noise_key(1, (0,)), noise_key(1, (1,)), noise_key(2, (0,))], np.uint64)
    noise = gumbel(keys, np.array([5, 5, 5]), 50_000)
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    assert np.abs(np.corrcoef(noise)[np.triu_indices(3, 1)]).max() < 0.02
    assert np.array_equal(gumbel(keys[1:2], np.array([5]), 50_000)[0], noise[1])
    assert np.array_equal(gumbel(keys[:1], np.array([5]), 10)[0], noise[0, :10])
    assert not np.array_equal(gumbel(keys[:1], np.array([6]), 10)[0], noise[0, :10])
    assert np.isfinite(noise).all()


def test_greedy_takes_the_lowest_id_on_ties():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert Batch([Sampling(), Sampling()], [0, 0]).draw(logits, np.array([0, 0])).tokens == [1, 0]


def test_truncation_keeps_at_least_the_first_and_breaks_ties_by_id():
    scores = np.log(np.array([0.25, 0.25, 0.25, 0.25], np.float32))
    assert kept(scores, Sampling(1.0, top_k=2)).tolist() == [0, 1]
    assert kept(scores, Sampling(1.0, top_p=1e-9)).tolist() == [0]
    assert kept(scores, Sampling(1.0, min_p=1.0)).tolist() == [0, 1, 2, 3]


def test_engine_samples_the_model_s_distribution_over_strings(tmp_path):
    """All strings of two tokens over a tiny vocabulary, enumerated with the plain model."""
    folder = save_model(tmp_path, vocabulary=267)
    plain = load_plain(folder)
    with torch.no_grad():
        plain.lm_head.weight[7:] = 0
        plain.lm_head.weight[:7] *= 0.5
    # Entries from 7 on all get logit 0; they are cut off by top_k = 4 or stay equal: both are part of the law below.
    plain.save_pretrained(folder)
    n = 1500

    async def main():
        async with opened(folder, max_batch=256) as engine:
            graph = ThreadGraph()
            start = await root(engine, graph, "abc")
            sampling = Sampling(1.0, top_k=4, max_tokens=2, ignore_eos=True)
            nodes = [graph.add([Edge(0, len(start))], path=[i]) for i in range(n)]
            deltas = await asyncio.gather(*(generate(engine, graph, node, sampling, seed=5) for node in nodes))
            return start.tokens, [tuple(delta.tokens) for delta in deltas]

    prompt, drawn = asyncio.run(main())

    def following(ids):
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, -1]
        best = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))[:4]
        return dict(zip(best, logits[best].softmax(-1).tolist(), strict=True))

    law = {(a, b): p * q for a, p in following(prompt).items() for b, q in following([*prompt, a]).items()}
    assert set(drawn) <= set(law)
    found = np.array([drawn.count(pair) / n for pair in law])
    assert chi_square(found, np.array(list(law.values())), n) < 44  # 15 degrees of freedom, 1 in 10,000


def test_logprobs_are_the_raw_model_s_and_alternatives_come_on_request(tiny):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            node = await root(engine, graph)
            sampling = Sampling(0.3, top_k=3, max_tokens=6, ignore_eos=True, top_logprobs=3)
            delta = await generate(engine, graph, node, sampling)
            await check_parity(engine, graph)  # temperature and truncation do not enter
            assert [len(top) for top in delta.top] == [3] * 6
            for token, value, top in zip(delta.tokens, delta.logprobs, delta.top, strict=True):
                assert top[token] == pytest.approx(value, abs=1e-6)  # top_k = 3: one of the best three
            plain = Sampling(max_tokens=2, ignore_eos=True)
            assert (await generate(engine, graph, graph.add([Edge(0, 3)]), plain)).top == []

    asyncio.run(main())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"stop": ("",)},
    ],
)
def test_impossible_sampling_is_refused(tiny, wrong):
    async def main():
        async with opened(tiny) as engine:
            graph = ThreadGraph()
            await generate(engine, graph, await root(engine, graph), Sampling(**wrong))

    with pytest.raises(UsageError, match=next(iter(wrong)) if "stop" not in wrong else "empty stop string"):
        asyncio.run(main())
