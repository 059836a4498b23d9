"""Reward-guided SMC: its targets and its evidence by enumeration, particle filtering step by step, its laws."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from engines import DEMO, opened, run
from enumerated import (
    EOS,
    INITIAL,
    PROMPT,
    SMALL,
    Ids,
    distance,
    everything,
    key_of,
    keyed,
    log_p,
    log_tempered,
    normalised,
    shares,
)

import orchestra
from orchestra import Outcome
from orchestra.errors import SpecError, UsageError
from orchestra.strategies.potentials import log_potential
from orchestra.strategies.reward_smc import RewardSmc
from orchestra.testing import check_parity, check_strategy
from orchestra.testing.scripted import ScriptedEngine, replies

TOKENS = 3
ALPHA = 3.0
Texts = dict[Ids, list[list[float]]]


def reward(text: str) -> float:
    """Of the text so far, from 0 to 1; it likes quotation marks, and says little of the end at the beginning."""
    return (1 + text.count('"')) / (5 + text.count("!") + 2 * text.count("<"))


def quoted(text: str) -> bool:
    """A constraint."""
    return "!" not in text


@pytest.fixture(scope="module")
def small(make_model: Callable[..., str]) -> str:
    return make_model("llama", vocabulary=SMALL, initializer_range=INITIAL)


@pytest.fixture(scope="module")
def texts(small: str) -> Texts:
    async def main() -> Texts:
        async with opened(small) as engine:
            return everything(engine.plain_model(), (await engine.encode_prompt(PROMPT)).tokens, TOKENS)

    return asyncio.run(main())


def weights(
    texts: Texts,
    target: str,
    score: Callable[[str], float] | None = None,
    potential: Any = "odds",
    alpha: float = ALPHA,
) -> dict[Ids, float]:
    """The logarithm of the target before it is normalised, by its definition."""

    def law(ids: Ids) -> float:
        return log_tempered(ids, texts[ids], alpha) if target == "tempered" else alpha * log_p(ids, texts[ids])

    def worth(ids: Ids) -> float:
        return log_potential(float(score(key_of(ids)[0])), potential) if score else 0.0

    return {ids: law(ids) + worth(ids) for ids in texts}


def log_total(log_weights: dict[Ids, float]) -> float:
    return math.log(math.fsum(map(math.exp, log_weights.values())))


async def filtered(folder: str, strategies: list[RewardSmc], seeds: range = range(1)) -> list[Outcome]:
    async with opened(folder) as engine, orchestra.connect(engine) as connection:
        return await asyncio.gather(
            *(
                connection.run(strategy, PROMPT, seed=seed, skip_special_tokens=False)
                for strategy in strategies
                for seed in seeds
            )
        )


SETTINGS: dict[str, dict[str, Any]] = {
    "tempered": {"reward": reward},
    "tempered, moved": {"reward": reward, "moves": 2, "ess": 1.0},
    "tempered, constraint": {"reward": quoted, "potential": "score"},
    "tempered, exp, chopthin": {"reward": reward, "potential": "exp", "resampler": "chopthin", "ess": 1.0},
    "power": {"target": "power"},
    "power, rewarded": {"target": "power", "reward": reward, "ess": 1.0, "resampler": "residual"},
    "power, look-ahead": {"target": "power", "reward": reward, "lookahead": 2, "resampler": "stratified"},
    "power, look-ahead, moved": {"target": "power", "reward": reward, "lookahead": 1, "moves": 1, "ess": 1.0},
}


def oracle(texts: Texts, setting: dict[str, Any]) -> dict[Ids, float]:
    return weights(texts, setting.get("target", "tempered"), setting.get("reward"), setting.get("potential", "odds"))


def strategy(particles: int, **setting: Any) -> RewardSmc:
    return RewardSmc(particles=particles, alpha=ALPHA, step_tokens=1, max_tokens=TOKENS, **setting)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_particles_are_near_their_target(small: str, texts: Texts, name: str) -> None:
    (outcome,) = asyncio.run(filtered(small, [strategy(256, **SETTINGS[name])]))
    wanted = oracle(texts, SETTINGS[name])
    assert distance(shares(outcome.candidates), keyed(normalised(wanted))) < 0.13
    assert sum(candidate.weight for candidate in outcome.candidates) == pytest.approx(1)
    assert outcome.log_evidence == pytest.approx(log_total(wanted), abs=0.4)
    assert outcome.approximate == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tempered", "tempered, exp, chopthin", "power, rewarded", "power, look-ahead, moved"])
def test_thousands_of_particles_are_at_their_target(small: str, texts: Texts, name: str) -> None:
    (outcome,) = asyncio.run(filtered(small, [strategy(4096, **SETTINGS[name])]))
    assert distance(shares(outcome.candidates), keyed(normalised(oracle(texts, SETTINGS[name])))) < 0.03


def test_the_targets_are_not_each_other(texts: Texts) -> None:
    laws = [normalised(oracle(texts, SETTINGS[name])) for name in ("tempered", "tempered, constraint", "power")]
    laws += [normalised(weights(texts, "power", reward)), normalised(weights(texts, "tempered"))]
    assert min(distance(one, other) for i, one in enumerate(laws) for other in laws[:i]) > 0.1
    assert 0.05 < sum(p for ids, p in laws[3].items() if ids[-1] == EOS) < 0.95


EVIDENCE = ["tempered", "power, look-ahead, moved", "tempered, exp, chopthin"]


@pytest.mark.parametrize(
    ("name", "runs"),
    [(EVIDENCE[0], 200), (EVIDENCE[1], 80), *(pytest.param(name, 500, marks=pytest.mark.slow) for name in EVIDENCE)],
)
def test_the_evidence_is_unbiased(small: str, texts: Texts, name: str, runs: int) -> None:
    outcomes = asyncio.run(filtered(small, [strategy(4, **SETTINGS[name])], range(runs)))
    truth = log_total(oracle(texts, SETTINGS[name]))
    ratios = [math.exp((outcome.log_evidence or 0.0) - truth) for outcome in outcomes]
    assert abs(statistics.mean(ratios) - 1) <= 3 * statistics.stdev(ratios) / math.sqrt(runs)
    assert statistics.stdev(ratios) > 0.01, "an estimate"


# -- particle filtering ------------------------------------------------------------------------------------------------


def test_particle_filtering_weighs_by_the_latest_score_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three particles, three steps; each time all are resampled by the odds of their latest scores (arXiv 2502.01618).

    Which ones go on is decided here, so that every weight can be told by hand.
    """
    seen: list[list[float]] = []
    chosen = iter([[0, 0, 2], [0, 1, 1]])

    def resample(log_weights: list[float], method: str, rng: Any) -> Any:
        assert method == "multinomial"
        seen.append([round(math.exp(value), 6) for value in log_weights])
        return next(chosen), [0.0] * 3  # any constant: all weigh the same

    monkeypatch.setattr("orchestra.strategies.reward_smc.resample", resample)
    scores = {" a ;": 0.5, " b ;": 0.2, " c $": 0.8, " c": 0.8}
    scores |= {" a ; d ;": 0.9, " a ; e ;": 0.6, " a ; d ; f": 0.25, " a ; e ; f": 0.75}

    def said(context: str, path: tuple[int, ...]) -> str:
        after = context.split()
        if after == ["go"]:
            return [" a ;", " b ;", " c $"][path[0]]
        return " d ;" if len(after) == 3 and path[0] == 3 else " e ;" if len(after) == 3 else " f $"

    strategy = RewardSmc(
        particles=3,
        reward=lambda text: scores[text],
        step=" ;",
        step_tokens=None,
        alpha=1.25,
        product=True,
        ess=1,
        resampler="multinomial",
        pick="best",
    )
    outcome = run(strategy, ScriptedEngine(said), "go")
    odds = {score: round(score / (1 - score), 6) for score in (0.5, 0.2, 0.8, 0.9, 0.6, 0.25, 0.75)}
    # c has ended: it is weighed again at every step, by the one score that it has.
    assert seen == [[odds[0.5], odds[0.2], odds[0.8]], [odds[0.9], odds[0.6], odds[0.8]]]
    last = [odds[0.25], odds[0.75], odds[0.75]]
    assert [c.text for c in outcome.candidates] == [" a ; d ; f", " a ; e ; f", " a ; e ; f"]
    assert [c.weight for c in outcome.candidates] == pytest.approx([value / sum(last) for value in last])
    assert outcome.text == " a ; e ; f"
    assert outcome.log_evidence is None
    assert outcome.approximate


# -- what it says, and what it refuses ---------------------------------------------------------------------------------


def test_a_score_becomes_a_potential() -> None:
    assert log_potential(0.8, "odds") == pytest.approx(math.log(4))
    assert log_potential(1.0, "odds") == pytest.approx(math.log(1e7), abs=1e-6)
    assert log_potential(0.0, "odds") == pytest.approx(-math.log(1e7), abs=1e-6)
    assert log_potential(-3.5, "exp") == -3.5
    assert log_potential(0.25, "score") == pytest.approx(math.log(0.25))
    assert log_potential(0.0, "score") == -math.inf
    for score, potential in ((1.2, "odds"), (-0.1, "odds"), (-0.1, "score")):
        with pytest.raises(UsageError, match=r"a score of .* potential='exp'"):
            log_potential(score, potential)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("reward_smc(step_tokens=null)", "a step ends at"),
        ("reward_smc(step='x', moves=1)", "moves begin at any token"),
        ("reward_smc(lookahead=1)", "lookahead is for target='power'"),
    ],
)
def test_what_makes_no_sense_is_refused(spec: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        run(spec)


def test_what_truncates_the_distribution_is_refused_or_said() -> None:
    with pytest.raises(UsageError, match=r"top_p.*approximate=true"):
        run("reward_smc", max_tokens=8, top_p=0.9)
    outcome = run("reward_smc(particles=2, approximate=true)", max_tokens=8, top_p=0.9)
    assert "top_p" in outcome.approximate[0]


def test_a_constraint_that_nobody_meets_leaves_no_answer() -> None:
    strategy = RewardSmc(particles=3, reward=lambda text: False, potential="score", max_tokens=8)
    outcome = run(strategy)
    assert (outcome.text, outcome.answer, outcome.log_evidence) == ("", None, None)
    assert [candidate.weight for candidate in outcome.candidates] == [0, 0, 0]
    assert outcome.approximate == ["no particle is left: the potential of all is zero"]


def test_a_reward_may_be_awaited_and_a_scorer_named() -> None:
    async def reward(text: str) -> float:
        await asyncio.sleep(0)
        return 0.5

    outcome = run(RewardSmc(particles=2, reward=reward, max_tokens=8))
    assert [candidate.weight for candidate in outcome.candidates] == [0.5, 0.5]
    scored = run("reward_smc(particles=2, scorer=logprob, potential='exp', max_tokens=8)")
    logprobs = [candidate.logprob for candidate in scored.candidates]
    assert None not in logprobs
    weights = [candidate.weight for candidate in scored.candidates]
    assert math.log(weights[0] / weights[1]) == pytest.approx(logprobs[0] - logprobs[1])  # type: ignore[operator]
    judged = run("reward_smc(particles=2, scorer=judge(samples=1), potential='exp')", ScriptedEngine(replies(" a $")))
    assert judged.approximate == ["judge scores particles beside others"]


@pytest.mark.parametrize("most", [1, 20, 40])
def test_what_a_budget_leaves_is_a_particle(most: int) -> None:
    outcome = run("reward_smc(particles=3, step_tokens=4, max_tokens=16)", budget=f"sampled_tokens={most}")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.usage.sampled_tokens <= most
    assert outcome.text


# -- the laws ----------------------------------------------------------------------------------------------------------

SPECS = [
    "reward_smc(particles=3, step_tokens=3, max_tokens=9, ess=1, moves=1)",
    "reward_smc(particles=3, step_tokens=4, max_tokens=8, ess=1, target='power', alpha=2, lookahead=1)",
]


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws_hold_on_a_script(spec: str) -> None:
    asyncio.run(asyncio.wait_for(check_strategy(ScriptedEngine(replies(" a b c d e f $", " g h $")), spec, "go"), 60))


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws_hold_on_real_models(tiny: str, spec: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            await check_parity(engine, (await check_strategy(engine, spec, "the answer is")).graph)

    asyncio.run(asyncio.wait_for(main(), 120))


def test_a_server_can_be_sampled_from(sglang_server: Any) -> None:
    """At alpha=1 tokens are drawn from the model itself: its log-probabilities are those of the draw, weights are 1."""

    async def main() -> None:
        async with orchestra.connect(f"sglang://127.0.0.1:{sglang_server.port}") as server:
            plain = "reward_smc(particles=3, target='power', step_tokens=4, ess=1, moves=1, max_tokens=12)"
            outcome = await server.run(plain, DEMO)
            assert outcome.log_evidence == pytest.approx(0, abs=1e-2)
            assert outcome.approximate == []
            flat = await server.run(plain.replace("particles=3", "particles=3, alpha=0.25"), DEMO)
            assert flat.log_evidence is not None
            assert flat.log_evidence > 0.05, "the sum of p ** 0.25 is above 1"
            for spec in ("power_mh(alpha=2, blocks=2, moves=3, max_tokens=12)", "cautious(trials=3, max_tokens=12)"):
                outcome = await server.run(spec, DEMO)
                outcome.graph.check_integrity()
                assert outcome.text
                assert outcome.usage.sampled_tokens == outcome.graph.count("sampled")

    asyncio.run(asyncio.wait_for(main(), 200))
