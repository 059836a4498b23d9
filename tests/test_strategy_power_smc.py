"""Power-SMC: its target by exact enumeration on a real model, its evidence, its laws."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest
from enumerated import Ids, distance, everything, keyed, log_p, normalised, shares
from hypothesis import given
from hypothesis import strategies as st

import orchestra
from orchestra import Outcome
from orchestra.errors import UsageError
from orchestra.runtime.engine import Engine
from orchestra.runtime.local.engine import LocalEngine
from orchestra.strategies.power_smc import PowerSmc, PowerWeights
from orchestra.testing import check_parity, check_strategy

# A model and a prompt for which short texts and long ones share the target: weights are uneven, and it takes both to be
# right about the end of sequence and about lengths.
MODEL = {"vocabulary": 7, "initializer_range": 0.28}
PROMPT = "###"
TOKENS = 3
ALPHA = 4.0
MANY = 4096
Texts = dict[Ids, list[list[float]]]


@pytest.fixture(scope="module")
def small(make_model: Callable[..., str]) -> str:
    return make_model("llama", **MODEL)


def run(folder: str, *specs: str, seeds: int = 1, tokens: int = TOKENS, **options: Any) -> list[Outcome]:
    async def main() -> list[Outcome]:
        async with orchestra.connect(LocalEngine(folder, **{"max_batch": MANY, **options})) as connection:
            found = []
            for spec in specs:
                for seed in range(seeds):
                    found.append(
                        await connection.run(spec, PROMPT, seed=seed, max_tokens=tokens, skip_special_tokens=False)
                    )
            return found

    return asyncio.run(main())


@pytest.fixture(scope="module")
def texts(small: str) -> Texts:
    engine = LocalEngine(small)

    async def main() -> Texts:
        prompt = await engine.encode_prompt(PROMPT)
        found = everything(engine.plain_model(), prompt.tokens, TOKENS)
        await engine.close()
        return found

    return asyncio.run(main())


def target(texts: Texts, alpha: float = ALPHA) -> dict[Any, float]:
    return keyed(normalised({ids: alpha * log_p(ids, tables) for ids, tables in texts.items()}))


def evidence(texts: Texts, alpha: float = ALPHA) -> float:
    return math.fsum(math.exp(alpha * log_p(ids, tables)) for ids, tables in texts.items())


def off(outcome: Outcome, law: dict[Any, float]) -> float:
    return distance(shares(outcome.candidates), law)


RESAMPLERS = ["systematic", "multinomial", "stratified", "residual", "chopthin"]
PROPOSALS = [{"ramp": 0}, {"ramp": 3}, {"ramp": 3, "ess": 1}, {"ramp": 0, "temperature": 1.0},
             {"ramp": 2, "temperature": 0.5, "ess": 0.9}, {"ramp": 3, "ess": 1, "block": 2}]  # fmt: skip


@pytest.mark.parametrize("resampler", RESAMPLERS)
def test_the_particles_follow_the_target(small: str, texts: Texts, resampler: str) -> None:
    (outcome,) = run(small, f'power_smc(particles=1024, ramp=3, ess=1, resampler="{resampler}")')
    assert any(node.notes.get("ancestors") for node in outcome.graph.nodes)  # it did resample
    assert off(outcome, target(texts)) < 0.035
    assert off(outcome, target(texts, 1.0)) > 0.3  # so the test can tell one target from another
    assert math.fsum(candidate.weight for candidate in outcome.candidates) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("proposal", PROPOSALS, ids=str)
def test_four_thousand_particles_are_close_to_the_target(
    small: str, texts: Texts, resampler: str, proposal: dict[str, Any]
) -> None:
    if resampler == "multinomial":  # its own noise is that of a sample: at every step it would be three samples'
        proposal = {**proposal, "ess": 0.5}
    elif "ess" not in proposal:
        proposal = {**proposal, "ess": 0.95}
    words = ", ".join(f"{key}={value}" for key, value in proposal.items())
    (outcome,) = run(small, f'power_smc(particles={MANY}, resampler="{resampler}", {words})')
    assert off(outcome, target(texts)) < 0.015


def test_truncation_breaks_the_target_and_is_refused(small: str, texts: Texts) -> None:
    spec = "power_smc(particles=1024, ramp=3, ess=1, approximate=true)"

    async def main() -> Outcome:
        async with orchestra.connect(LocalEngine(small, max_batch=MANY)) as connection:
            with pytest.raises(UsageError, match=r"top_p=0\.9 would change that"):
                await connection.run("power_smc()", PROMPT, top_p=0.9, max_tokens=TOKENS)
            return await connection.run(spec, PROMPT, top_p=0.3, max_tokens=TOKENS, skip_special_tokens=False)

    outcome = asyncio.run(main())
    assert outcome.approximate == ["top_p=0.3"]
    assert off(outcome, target(texts)) > 0.03


@pytest.mark.parametrize(
    "options",
    [
        "ramp=3, ess=1",
        pytest.param("ramp=0", marks=pytest.mark.slow),
        pytest.param('ramp=2, ess=0.9, resampler="chopthin"', marks=pytest.mark.slow),
    ],
)
def test_the_evidence_is_unbiased(small: str, texts: Texts, options: str) -> None:
    runs = 500
    found = [
        math.exp(outcome.log_evidence or 0) for outcome in run(small, f"power_smc(particles=8, {options})", seeds=runs)
    ]
    mean = math.fsum(found) / runs
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (runs - 1) / runs)
    assert abs(mean - evidence(texts)) < 3 * error
    assert error < 0.15 * evidence(texts)  # so that the line above can fail


def test_a_draw_is_by_weight(small: str) -> None:
    """And not the heaviest one, which would be chosen in every run."""
    runs = 100
    over = 0.0
    spread = 0.0
    for outcome in run(small, "power_smc(particles=8, ramp=3, ess=0)", seeds=runs):
        shown = shares(outcome.candidates)
        heaviest = max(shown, key=lambda key: shown[key])
        over += (outcome.text == heaviest[0]) - shown[heaviest]
        spread += shown[heaviest] * (1 - shown[heaviest])
    assert abs(over) < 4 * math.sqrt(spread)
    assert spread > 10  # so that an argmax, which is over by more than the spread, would be noticed


def test_weights_and_log_probabilities_are_those_of_a_dense_forward(small: str, texts: Texts) -> None:
    (outcome,) = run(small, "power_smc(particles=64, ramp=3, ess=1)", debug=True)
    by_key = {key: log_p(*text) for key, text in zip(keyed(dict.fromkeys(texts, 0.0)), texts.items(), strict=True)}
    for candidate in outcome.candidates:
        assert candidate.logprob == pytest.approx(by_key[candidate.text, candidate.tokens], abs=1e-4)

    async def main() -> None:
        async with orchestra.connect(LocalEngine(small, debug=True)) as connection:
            again = await connection.run("power_smc(particles=32, ramp=20, ess=1)", PROMPT, max_tokens=24)
            await check_parity(connection.engine, again.graph)

    asyncio.run(main())


def test_seeds_differ_and_one_seed_repeats_beside_others(small: str) -> None:
    one, other, *_ = run(small, "power_smc(particles=32, ramp=8)", seeds=2, tokens=16)
    (again,) = run(small, "power_smc(particles=32, ramp=8)", tokens=16, prefill=16, copy_bytes=0)
    assert [c.text for c in one.candidates] == [c.text for c in again.candidates]
    assert one.text == again.text
    assert [c.text for c in one.candidates] != [c.text for c in other.candidates]

    async def main(engine: Engine) -> None:
        await check_strategy(engine, "power_smc(particles=6, ramp=8, ess=0.9)", PROMPT, max_tokens=20)
        await engine.close()

    asyncio.run(main(LocalEngine(small)))


@given(
    st.lists(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=4, max_size=4), min_size=1, max_size=6),
    st.permutations(range(4)),
    st.floats(0.5, 8),
)
def test_permuted_particles_have_permuted_weights(
    steps: list[list[tuple[float, float]]], order: list[int], alpha: float
) -> None:
    def weigh(order: list[int]) -> PowerWeights:
        weights = PowerWeights(4)
        for number, step in enumerate(steps, 1):
            weights.raise_to(1 + (alpha - 1) * number / len(steps))
            for index, old in enumerate(order):
                weights.grow(index, *step[old])
        return weights

    plain, permuted = weigh([0, 1, 2, 3]), weigh(order)
    assert permuted.logs == [plain.logs[old] for old in order]
    # After all: alpha log p of the whole text, less what it was drawn with.
    for index in range(4):
        logprob = math.fsum(step[index][0] for step in steps)
        tempered = math.fsum(step[index][1] for step in steps)
        assert plain.logs[index] == pytest.approx(alpha * logprob - tempered, abs=1e-6)


def test_the_ramp_ends_at_alpha_and_blocks_hold_still() -> None:
    strategy = PowerSmc(alpha=4, ramp=100)
    assert strategy.exponent(0) == pytest.approx(1.03)
    assert strategy.exponent(99) == strategy.exponent(5000) == 4
    assert PowerSmc(alpha=4, ramp=0).exponent(0) == 4


@pytest.mark.parametrize("budget", ["sampled_tokens=60", "critical_path_tokens=5", "requests=9", "wall_seconds=60"])
def test_a_budget_leaves_the_heaviest_particle(small: str, budget: str) -> None:
    async def main() -> Outcome:
        async with orchestra.connect(LocalEngine(small)) as connection:
            settings = {"max_tokens": 30, "ignore_eos": True, "budget": budget}
            return await connection.run("power_smc(particles=8, ramp=4, ess=1)", PROMPT, **settings)

    outcome = asyncio.run(main())
    if "wall" in budget:
        assert outcome.stopped_by is None
        return
    name, limit = budget.split("=")
    assert outcome.stopped_by == name
    assert getattr(outcome.usage, name) <= int(limit)
    assert len(outcome.candidates) == 8
    assert outcome.text == max(outcome.candidates, key=lambda candidate: candidate.weight).text


def test_it_goes_blockwise_where_the_engine_has_no_lock_step(small: str, texts: Texts) -> None:
    from orchestra.runtime.engine import Capability

    class Blocks(LocalEngine):
        capabilities = LocalEngine.capabilities - {Capability.LOCK_STEP}

    async def main(spec: str) -> Outcome:
        async with orchestra.connect(Blocks(small, max_batch=MANY)) as connection:
            return await connection.run(spec, PROMPT, max_tokens=TOKENS, skip_special_tokens=False)

    for options in ("block=1, ramp=3, ess=1", "block=2, ramp=3"):
        outcome = asyncio.run(main(f"power_smc(particles=1024, {options})"))
        assert off(outcome, target(texts)) < 0.035


def test_on_a_real_server_it_has_the_same_target_and_evidence(sglang_server: Any) -> None:
    """Blocks of one token, drawn at the server and scored by another pass; texts of two tokens can be enumerated."""
    import torch
    from transformers import AutoModelForCausalLM

    from orchestra.runtime.connect import EMBEDDED

    # No ramp: over two tokens of a model this sure of itself its own noise would be larger than what is to be seen.
    alpha, prompt = 0.4, "numbers: 3 7 8"

    async def main() -> tuple[list[int], Outcome]:
        async with orchestra.connect(f"sglang://127.0.0.1:{sglang_server.port}") as connection:
            ids = (await connection.engine.encode_prompt(prompt)).tokens
            spec = f"power_smc(alpha={alpha}, particles=300, block=1, ramp=0, ess=0.9)"
            return ids, await connection.run(spec, prompt, max_tokens=2, ignore_eos=True)

    ids, outcome = asyncio.run(main())
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    with torch.no_grad():
        first = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
        rows = torch.tensor([[*ids, token] for token in range(len(first))])
        table = first[:, None] + model(rows).logits[:, -1].double().log_softmax(-1)
    exact = float((alpha * table).flatten().logsumexp(0))
    assert outcome.log_evidence == pytest.approx(exact, abs=0.1)
    assert float((2 * alpha * table).flatten().logsumexp(0) - exact) < -0.5  # a wrong exponent would be noticed
    for node in outcome.graph.nodes:
        chain = outcome.graph.path_tokens(node.id)[len(ids) :] if node.count("sampled") else []
        if len(chain) == 2:
            second = float((table - first[:, None])[tuple(chain)])
            assert node.spans[-1].logprobs == pytest.approx([second], abs=1e-3)
