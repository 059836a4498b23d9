"""Power sampling by Metropolis-Hastings: its moves by exact enumeration, its chain on a real model, its laws."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
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
    keyed,
    log_p,
    normalised,
    shares,
)

import orchestra
from orchestra import Outcome
from orchestra.errors import CapabilityError, UsageError
from orchestra.runtime.engine import Engine
from orchestra.strategies.continuation import log_ratio
from orchestra.testing import check_parity, check_strategy
from orchestra.testing.scripted import ScriptedEngine, replies

TOKENS = 3
ALPHA = 4.0
Acceptance = Callable[["Said", "Said", int, float], float]


async def ask(engine: Engine, spec: str, prompt: str, **settings: Any) -> Outcome:
    async with orchestra.connect(engine) as connection:
        return await connection.run(spec, prompt, **settings)


@pytest.fixture(scope="module")
def small(make_model: Callable[..., str]) -> str:
    return make_model("llama", vocabulary=SMALL, initializer_range=INITIAL)


@pytest.fixture(scope="module")
def texts(small: str) -> dict[Ids, list[list[float]]]:
    return enumerated(small, PROMPT)


def enumerated(folder: str, prompt: str) -> dict[Ids, list[list[float]]]:
    async def main() -> dict[Ids, list[list[float]]]:
        async with opened(folder) as engine:
            return everything(engine.plain_model(), (await engine.encode_prompt(prompt)).tokens, TOKENS)

    return asyncio.run(main())


def target(texts: dict[Ids, list[list[float]]], alpha: float = ALPHA) -> dict[Ids, float]:
    return normalised({ids: alpha * log_p(ids, tables) for ids, tables in texts.items()})


# -- the moves, exactly ------------------------------------------------------------------------------------------------


@dataclass
class Said:
    """A text with its log-probabilities by the model, and by the proposals."""

    logprobs: list[float]
    tempered: list[float]


def said(ids: Ids, tables: list[list[float]], temperature: float) -> Said:
    logs = [math.log(math.fsum(math.exp(value / temperature) for value in table)) for table in tables]
    raw = [table[token] for token, table in zip(ids, tables, strict=True)]
    return Said(raw, [value / temperature - log for value, log in zip(raw, logs, strict=True)])


def stationary(
    texts: dict[Ids, list[list[float]]], temperature: float, ratio: Acceptance, alpha: float = ALPHA
) -> dict[Ids, float]:
    """Where the chain of moves ends up, by its transition matrix."""
    import numpy as np

    states = list(texts)
    scored = {ids: said(ids, texts[ids], temperature) for ids in states}
    moves = np.zeros((len(states), len(states)))
    for i, old in enumerate(states):
        for j, new in enumerate(states):
            for cut in range(min(len(old), len(new))):
                if old[:cut] == new[:cut]:
                    drawn = math.exp(sum(scored[new].tempered[cut:])) / len(old)
                    moves[i, j] += drawn * math.exp(min(0.0, ratio(scored[old], scored[new], cut, alpha)))
        moves[i, i] += 1 - moves[i].sum()
    assert moves.min() > -1e-9
    for _ in range(20):
        moves = moves @ moves
        moves /= moves.sum(1, keepdims=True)
    return dict(zip(states, moves[0].tolist(), strict=True))


def no_cut_term(old: Said, new: Said, cut: int, alpha: float) -> float:
    return ratio_of(old, new, cut, len(old.logprobs), len(new.logprobs), alpha)


def clipped(old: Said, new: Said, cut: int, alpha: float) -> float:
    """Both suffixes cut to the shorter: what the released code of the paper does."""
    end = min(len(old.logprobs), len(new.logprobs))
    return ratio_of(old, new, cut, end, end, alpha)


def no_proposal(old: Said, new: Said, cut: int, alpha: float) -> float:
    return alpha * (sum(new.logprobs[cut:]) - sum(old.logprobs[cut:]))


def ratio_of(old: Said, new: Said, cut: int, old_end: int, new_end: int, alpha: float) -> float:
    p = sum(new.logprobs[cut:new_end]) - sum(old.logprobs[cut:old_end])
    return alpha * p + sum(old.tempered[cut:old_end]) - sum(new.tempered[cut:new_end])


@pytest.mark.parametrize("temperature", [0.25, 0.6, 1.0])
def test_the_moves_lead_to_the_power_of_the_whole_text(texts: dict[Ids, list[list[float]]], temperature: float) -> None:
    assert len(texts) == 1 + 5 + 5 * 5 * 6
    assert distance(stationary(texts, temperature, log_ratio), target(texts)) < 1e-6


@pytest.mark.parametrize("wrong", [no_cut_term, clipped, no_proposal])
@pytest.mark.parametrize("temperature", [0.25, 0.6])
def test_they_would_not_if_a_term_were_missing(
    texts: dict[Ids, list[list[float]]], temperature: float, wrong: Acceptance
) -> None:
    assert distance(stationary(texts, temperature, wrong), target(texts)) > 0.02


def test_the_target_is_neither_the_model_nor_the_model_at_a_low_temperature(
    texts: dict[Ids, list[list[float]]],
) -> None:
    assert distance(target(texts), target(texts, 1.0)) > 0.3
    colder = {ids: sum(said(ids, tables, 1 / ALPHA).tempered) for ids, tables in texts.items()}
    assert distance(target(texts), normalised(colder)) > 0.3
    assert 0.3 < sum(p for ids, p in target(texts).items() if ids[-1] == EOS) < 0.9, "lengths that differ"


# -- the chain, on the engine ------------------------------------------------------------------------------------------


async def visited(folder: str, spec: str, prompt: str, runs: int) -> tuple[dict[Any, float], list[Outcome]]:
    """Where the chains of so many runs have been, and their outcomes."""
    async with opened(folder) as engine, orchestra.connect(engine) as connection:
        outcomes = await asyncio.gather(
            *(connection.run(spec, prompt, seed=seed, skip_special_tokens=False) for seed in range(runs))
        )
    return shares(candidate for outcome in outcomes for candidate in outcome.candidates), outcomes


def test_a_short_chain_is_near_the_target(small: str, texts: dict[Ids, list[list[float]]]) -> None:
    """At these settings the chain forgets where it was in eight moves (by its transition matrix)."""
    spec = "power_mh(alpha=2, blocks=2, moves=50, max_tokens=3, temperature=1.0)"
    found, outcomes = asyncio.run(visited(small, spec, PROMPT, 32))
    assert distance(found, keyed(target(texts, 2))) < 0.2
    assert distance(keyed(target(texts, 1)), keyed(target(texts, 2))) > 0.3
    assert len({outcome.text for outcome in outcomes}) > 1, "different seeds differ"
    assert all(outcome.approximate == [] for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "prompt"), [(1.0, PROMPT), (0.6, "!")])
def test_a_long_chain_is_at_the_target(make_model: Callable[..., str], temperature: float, prompt: str) -> None:
    folder = make_model("llama", vocabulary=SMALL, initializer_range=INITIAL)
    spec = f"power_mh(alpha=4, blocks=1, moves=1200, max_tokens=3, temperature={temperature})"
    found, _ = asyncio.run(visited(folder, spec, prompt, 64))
    assert distance(found, keyed(target(enumerated(folder, prompt)))) < 0.02


# -- what it says, and what it refuses ---------------------------------------------------------------------------------


def test_the_result_is_a_state_of_the_chain_and_can_be_gone_on_from() -> None:
    @orchestra.strategy
    async def more(thread: orchestra.Thread) -> orchestra.Thread:
        inner = await thread.run("power_mh(blocks=3, moves=4, max_tokens=24)")
        assert inner.text in [candidate.text for candidate in inner.candidates]
        assert sum(candidate.weight for candidate in inner.candidates) == pytest.approx(1)
        assert inner.thread is not None
        assert inner.thread.text == inner.text
        return inner.thread.append(" answer:")

    async def main() -> Outcome:
        async with orchestra.connect("demo") as connection:
            return await connection.run(more(), DEMO, seed=1)

    outcome = asyncio.run(asyncio.wait_for(main(), 60))
    outcome.graph.check_integrity()
    assert outcome.text.endswith(" answer:")


def test_without_moves_at_alpha_one_it_is_a_plain_sample_of_the_length() -> None:
    outcome = run("power_mh(alpha=1, moves=0, blocks=4, max_tokens=20)")
    assert outcome.usage.sampled_tokens == outcome.candidates[0].tokens <= 20
    assert outcome.candidates[0].weight == 1


def test_the_moves_cost_what_is_drawn_anew() -> None:
    outcome = run("power_mh(blocks=2, moves=6, max_tokens=16)")
    usage = outcome.usage
    assert usage.sampled_tokens == outcome.graph.count("sampled") == usage.critical_path_tokens
    assert usage.requests <= 2 + 2 * 6


@pytest.mark.parametrize("setting", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"stop": "="}])
def test_what_truncates_the_distribution_is_refused_or_said(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UsageError, match=f"{name}.*approximate=true"):
        run("power_mh", max_tokens=8, **setting)
    outcome = run("power_mh(approximate=true, blocks=1, moves=1)", max_tokens=8, **setting)
    assert len(outcome.approximate) == 1
    assert name in outcome.approximate[0]


def test_an_early_stop_is_said() -> None:
    engine = ScriptedEngine(replies(" a b $"))
    early = run("power_mh(early_stop=true, blocks=4, moves=1, max_tokens=16)", engine, "go")
    assert early.finish_reason == "stop"
    assert early.approximate == ["early_stop after block 1 of 4"]
    whole = run("power_mh(blocks=4, moves=1, max_tokens=16)", engine, "go")
    assert whole.approximate == []
    assert whole.usage.requests > early.usage.requests


def test_an_engine_that_cannot_say_what_it_drew_from_is_named() -> None:
    class Mute(ScriptedEngine):
        capabilities = ScriptedEngine.capabilities - {orchestra.runtime.engine.Capability.TEMPERED}

    with pytest.raises(CapabilityError, match="power_mh needs tempered"):
        run("power_mh", Mute(replies(" a $")))


@pytest.mark.parametrize("most", [1, 9, 17, 40])
def test_what_a_budget_leaves_is_where_the_chain_stood(most: int) -> None:
    outcome = run("power_mh(blocks=4, moves=5, max_tokens=32)", budget=f"sampled_tokens={most}")
    assert outcome.stopped_by == "sampled_tokens"
    assert outcome.usage.sampled_tokens <= most
    assert len(outcome.candidates) == 1
    assert outcome.text == outcome.candidates[0].text != ""


# -- the laws ----------------------------------------------------------------------------------------------------------

SPEC = "power_mh(blocks=3, moves=3, max_tokens=12)"


def test_the_laws_hold_on_a_script() -> None:
    asyncio.run(asyncio.wait_for(check_strategy(ScriptedEngine(replies(" a b c d e f $", " g h $")), SPEC, "go"), 60))


def test_the_laws_hold_on_real_models(tiny: str) -> None:
    async def main() -> None:
        async with opened(tiny) as engine:
            await check_parity(engine, (await check_strategy(engine, SPEC, "the answer is")).graph)

    asyncio.run(asyncio.wait_for(main(), 120))
