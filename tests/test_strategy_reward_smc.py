"""Reward-guided SMC: its targets and its evidence by enumeration, particle filtering step by step, its laws."""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
from engines import opened
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
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Engine
from orchestra.strategies.potentials import log_potential
from orchestra.strategies.reward_smc import RewardSmc
from orchestra.testing import check_parity, check_strategy
from orchestra.testing.scripted import ScriptedEngine, replies

TOKENS = 3
ALPHA = 2.0
Texts = dict[Ids, list[list[float]]]


def reward(text: str) -> float:
    """Of the text so far, from 0 to 1; it likes quotation marks, and says little of the end at the beginning."""
    return (1 + text.count('"')) / (4 + text.count("!") + 2 * text.count("<"))


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
    assert distance(shares(outcome.candidates), keyed(normalised(wanted))) < 0.14
    assert sum(candidate.weight for candidate in outcome.candidates) == pytest.approx(1)
    assert outcome.log_evidence == pytest.approx(log_total(wanted), abs=0.4)
    assert outcome.approximate == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_thousands_of_particles_are_at_their_target(small: str, texts: Texts, name: str) -> None:
    (outcome,) = asyncio.run(filtered(small, [strategy(4096, **SETTINGS[name])]))
    assert distance(shares(outcome.candidates), keyed(normalised(oracle(texts, SETTINGS[name])))) < 0.035


def test_the_targets_are_not_each_other(texts: Texts) -> None:
    laws = [normalised(oracle(texts, SETTINGS[name])) for name in ("tempered", "tempered, constraint", "power")]
    laws += [normalised(weights(texts, "power", reward)), normalised(weights(texts, "tempered"))]
    assert min(distance(one, other) for i, one in enumerate(laws) for other in laws[:i]) > 0.1
    assert 0.05 < sum(p for ids, p in laws[3].items() if ids[-1] == EOS) < 0.9


EVIDENCE = ["tempered", "power, look-ahead, moved", "tempered, exp, chopthin"]


@pytest.mark.parametrize(("name", "runs"), [(EVIDENCE[0], 120), *((name, 60) for name in EVIDENCE[1:])])
def test_the_evidence_is_unbiased(small: str, texts: Texts, name: str, runs: int) -> None:
    outcomes = asyncio.run(filtered(small, [strategy(4, **SETTINGS[name])], range(runs)))
    ratios = [
        math.exp((outcome.log_evidence or 0.0) - log_total(oracle(texts, SETTINGS[name]))) for outcome in outcomes
    ]
    assert abs(statistics.mean(ratios) - 1) <= 3 * statistics.stdev(ratios) / math.sqrt(runs)
    assert statistics.stdev(ratios) > 0.01, "an estimate"
