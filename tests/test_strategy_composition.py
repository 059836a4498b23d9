"""Any strategy is a generator for any other, at any depth; budgets, cancellation and usage flow through."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playing import play

from orchestra.spec import parse_strategy
from orchestra.strategies import registry
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy

LEAVES = {
    "sample": "sample(temperature=0.9)",
    "spawn_join": "spawn_join",
    "threads": "threads",
    "map_reduce": "map_reduce",
    "budget_forcing": "budget_forcing(extensions=1)",
    "beam_search": "beam_search(width=2, max_tokens=4)",
    "cautious": "cautious(trials=2, punctuation=['#'])",
    "reward_smc": "reward_smc(particles=2, scorer=mean_logprob, potential='exp', ess=1)",
    "power_smc": "power_smc(particles=2, ramp=0)",
    "power_mh": "power_mh(blocks=2, moves=2, max_tokens=6)",
    "hogwild": "hogwild(instruct=False, max_tokens=6, finish='', ban_eos=False, ban=[])",
    "confidence_vote": "confidence_vote(samples=2, window=1, top=2, keep=1.0)",
}
BRANCHES = {
    "self_consistency": "self_consistency(samples=2, drafts={})",
    "first_finish": "first_finish(samples=2, drafts={})",
    "best_of": "best_of(samples=2, drafts={}, scorer=judge(samples=1))",
    "refine": "refine(rounds=1, drafts={})",
    "pdr": "pdr(widths=[2], k=1, distiller='random_k', drafts={})",
    "async_think": "async_think(drafts={})",
    "parallel_streams": "parallel_streams(streams=2, drafts={})",
}
PROMPT = "numbers: 3 7 8 12 target: 54"


def answers(context: str, position: int) -> dict[str, float]:
    """A model that says " so answer: 7" to everything, and is nearly sure of it."""
    said = context.rsplit(" so", 1)
    word = " so" if len(said) == 1 or " $" in said[1] else {"": " answer:", " answer:": " 7"}.get(said[1], "")
    return {word: -0.1, " oh": -3.0}


def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda context, path: " so answer: 7 $", top=answers)


def test_every_strategy_takes_part() -> None:
    built_in = {name for name, kind in registry().items() if kind.__module__.startswith("orchestra.strategies.")}
    assert LEAVES.keys() | BRANCHES.keys() == built_in
    taking = {name for name in built_in if "drafts" in registry()[name].model_fields}
    assert BRANCHES.keys() == taking - {"confidence_vote"}


@pytest.mark.parametrize("outer", BRANCHES)
@pytest.mark.parametrize("inner", sorted(LEAVES.keys() | BRANCHES.keys()))
def test_pairs(outer: str, inner: str) -> None:
    spec = BRANCHES[outer].format(LEAVES.get(inner) or BRANCHES[inner].format("sample"))
    assert parse_strategy(parse_strategy(spec).to_spec()) == parse_strategy(spec)
    outcome = play(spec, engine(), PROMPT)
    assert outcome.answer == "7"
    assert outcome.candidates


def nested(depth: int) -> st.SearchStrategy[str]:
    leaves = st.sampled_from(sorted(LEAVES.values()))
    if not depth:
        return leaves
    outer = st.sampled_from(sorted(BRANCHES.values()))
    return st.one_of(leaves, st.builds(str.format, outer, nested(depth - 1)))


@given(nested(4), st.integers(1, 60))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_depth_within_a_budget(spec: str, most: int) -> None:
    whole = play(spec, engine(), PROMPT)
    assert whole.answer == "7"
    for limit in ("sampled_tokens", "critical_path_tokens", "requests"):
        cut = play(spec, engine(), PROMPT, budget=f"{limit}={most}")
        assert getattr(cut.usage, limit) <= most
        assert (cut.stopped_by is None) or cut.stopped_by == limit
        if getattr(whole.usage, limit) <= most and limit != "sampled_tokens":  # those reserve what they may use
            assert cut.answer == "7"


@pytest.mark.parametrize(
    "spec",
    [
        "pdr(widths=[2], k=1, drafts=first_finish(samples=2))",
        "self_consistency(samples=2, drafts=refine(rounds=1, drafts=best_of(samples=2, scorer=checklist)))",
        "first_finish(samples=2, drafts=async_think(drafts=self_consistency(samples=2, drafts=spawn_join)))",
    ],
)
def test_the_laws_hold_of_the_whole(spec: str) -> None:
    asyncio.run(asyncio.wait_for(check_strategy(engine(), spec, PROMPT), 60))


STEPS = "3 + 7 = 10 , 8 - 3 = 5 , 5 * 10 = 50"


def test_a_vote_over_searches() -> None:
    def script(context: str, path: tuple[int, ...]) -> str:
        if len(path) > 1:
            return f" answer: {STEPS} $"
        return f" answer: {STEPS} $" if STEPS in context else " spawn: 3 + 7 = 10 left: 8 10 12\n join:"

    outcome = play("self_consistency(samples=3, drafts=spawn_join)", script, PROMPT)
    assert outcome.answer == STEPS
    assert len(outcome.candidates) == 3
    assert outcome.usage.requests == 9
    assert sum(c.tokens for c in outcome.candidates) == outcome.usage.sampled_tokens
