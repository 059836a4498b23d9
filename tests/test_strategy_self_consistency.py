"""Majority votes, and stopping when they are decided: by hand, by the laws, and against theory."""

from __future__ import annotations

import importlib.util
import math
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from voters import Grouped, binomial, close, laws_on, laws_on_the_embedded_model, replayed, run, voter, votes

from orchestra.errors import SpecError
from orchestra.spec import parse_strategy
from orchestra.strategies.voting import lead_certainty, majority, tally, unanimous
from orchestra.testing.scripted import ScriptedEngine, replies, words


def answers(*given: str) -> list[str]:
    return [f" answer: {answer} $" for answer in given]


# -- the vote ----------------------------------------------------------------------------------------------------------


def test_majority_ignores_those_without_an_answer_and_breaks_ties_by_order() -> None:
    said = [" answer: none $", " answer: 3 $", " answer: none $", " ANSWER: 4 $", " answer:  4 $"]
    outcome = run("self_consistency(samples=5)", replies(*said))
    assert outcome.answer == "4"
    assert votes(outcome) == [(None, 0), ("3", 1), (None, 0), ("4", 1), ("4", 1)]
    assert run("self_consistency(samples=2)", replies(*answers("8", "9"))).answer == "8"
    assert run("self_consistency(samples=2)", replies(*answers("none"))).answer is None


def test_weights_are_votes_and_no_weight_is_no_vote() -> None:
    assert majority([voter("a", 1.0), voter("B ", 0.6), voter("b", 0.5)]) == 1
    assert majority([voter("a", 0.0), voter("b", 0.1)]) == 1
    assert majority([voter("a", 0.0), voter("A", 0.5), voter("b", 0.4)]) == 1  # the first of those that voted for it
    assert majority([voter(None, 0.0), voter(None, 0.3)]) == 1
    assert tally([voter("x", 2.0), voter(None, 5.0), voter("y", 0.0), voter(" X", 1.0)]) == {"x": 3.0}
    assert unanimous([voter("a"), voter(" A")])
    assert not unanimous([voter("a"), voter(None)])
    assert not unanimous([voter(None), voter(None)])


# -- stopping ----------------------------------------------------------------------------------------------------------


def test_windows_stop_when_one_is_unanimous_and_all_that_was_drawn_votes() -> None:
    """The fourth window agrees on 5, but 4 had six votes before. Each window is a group, after the one before it."""
    engine = Grouped(replies(*answers("4", "4", "5", "4", "4", "6", "4", "7", "4", "5", "5", "5", "5", "5", "5")))
    outcome = run("self_consistency(samples=15, window=3, until='unanimous')", engine=engine)
    assert engine.groups == [3, 3, 3, 3]
    assert (outcome.answer, len(outcome.candidates)) == ("4", 12)
    assert votes(outcome)[:3] == [("4", 1), ("4", 1), ("5", 1)]
    assert (outcome.usage.sampled_tokens, outcome.usage.critical_path_tokens) == (36, 12)  # three words each
    assert outcome.usage.sequential_tokens == 4 * (1 + 3)


def test_windows_that_never_agree_go_on_to_the_last_sample() -> None:
    engine = Grouped(replies(*answers("1", "2", "none", "none", "3", "3", "3")))
    outcome = run("self_consistency(samples=7, window=2, until='unanimous')", engine=engine)
    assert engine.groups == [2, 2, 2]  # two without an answer do not agree; 3, 3 do
    assert outcome.answer == "3"
    engine = Grouped(replies(*answers("1", "2", "3", "1", "2")))
    outcome = run("self_consistency(samples=5, window=3, until='unanimous')", engine=engine)
    assert engine.groups == [3, 2]
    assert (outcome.answer, len(outcome.candidates)) == ("1", 5)


def test_confidence_is_asked_for_after_each_window() -> None:
    """After four equal answers the certainty is 1 - 1/32: the first above 0.95."""
    outcome = run("self_consistency(samples=40, until='confident')", replies(*answers("6")))
    assert (len(outcome.candidates), outcome.usage.critical_path_tokens) == (4, 12)
    engine = Grouped(replies(*answers("6")))
    outcome = run("self_consistency(samples=40, until='confident', window=3)", engine=engine)
    assert engine.groups == [3, 3]
    assert (len(outcome.candidates), outcome.usage.critical_path_tokens) == (6, 6)
    with_none = run("self_consistency(samples=40, until='confident')", replies(*answers("none", "6")))
    assert len(with_none.candidates) == 8  # no answer, no vote
    # After a dissent it takes six against one, 1 - (1 + 8) / 2^8 = 0.965; five against one have 0.9375.
    split = run("self_consistency(samples=40, until='confident')", replies(*answers("6", "7"), *answers("6") * 38))
    assert len(split.candidates) == 7


def test_a_budget_that_ends_in_a_window_yields_the_best_so_far() -> None:
    script = replies(*answers("4", "5", "5", "9"))
    outcome = run("self_consistency(samples=40, until='confident')", script, budget="sampled_tokens=10", max_tokens=5)
    assert (outcome.stopped_by, outcome.answer, len(outcome.candidates)) == ("sampled_tokens", "5", 3)
    assert outcome.usage.sampled_tokens == 10


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("self_consistency(window=4)", "say until="),
        ("self_consistency(window=1, until='unanimous')", "at least 2"),
        ("self_consistency(confidence=0.9)", "until='confident'"),
        ("self_consistency(until='confident', confidence=0.5)", "confidence"),
        ("self_consistency(until='confident', confidence=1)", "confidence"),
        ("self_consistency(until='bored')", "until"),
    ],
)
def test_nonsense_is_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_strategy(spec)


def test_a_spec_survives_the_round_trip() -> None:
    for spec in ["self_consistency(samples=40, until='confident', confidence=0.9)",
                 "self_consistency(samples=40, until='unanimous', window=4)"]:  # fmt: skip
        assert parse_strategy(parse_strategy(spec).to_spec()) == parse_strategy(spec)


# -- the laws ----------------------------------------------------------------------------------------------------------

SPECS = ["self_consistency(samples=4)", "self_consistency(samples=5, window=2, until='unanimous')",
         "self_consistency(samples=5, until='confident', confidence=0.6)"]  # fmt: skip


@pytest.mark.parametrize("spec", SPECS)
def test_the_laws(spec: str) -> None:
    lengths = words([9, 5, 7, 30])
    laws_on(ScriptedEngine(lambda _, path: lengths[path[-1] % 4]), spec)
    laws_on_the_embedded_model(spec, max_tokens=60, temperature=1)


# -- theory ------------------------------------------------------------------------------------------------------------


def posterior(a: int, b: int, steps: int = 4000) -> float:
    """The mass of Beta(a + 1, b + 1) above one half, by Simpson's rule."""

    def integral(low: float, high: float) -> float:
        h = (high - low) / steps
        weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
        return h / 3 * sum(w * (low + i * h) ** a * (1 - low - i * h) ** b for i, w in enumerate(weights))

    return integral(0.5, 1) / integral(0, 1)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (1, 0), (1, 1), (3, 1), (7, 2), (12, 12), (25, 15)])
def test_the_certainty_is_the_integral_of_the_posterior(a: int, b: int) -> None:
    assert lead_certainty(a, b) == pytest.approx(posterior(a, b), abs=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="SciPy is not installed")
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2048), st.integers(0, 2048))
def test_the_certainty_is_scipys(a: int, b: int) -> None:
    from scipy.stats import beta

    a, b = max(a, b), min(a, b)
    assert lead_certainty(a, b) == pytest.approx(float(beta.sf(0.5, a + 1, b + 1)), rel=1e-9)


def majority_is_right(n: int, p: float) -> float:
    """Chance that independent voters with two answers elect the right one; a tie goes to who came first: one half."""
    return sum(binomial(n, k, p) * (0.5 if 2 * k == n else float(2 * k > n)) for k in range(n + 1))


@pytest.mark.parametrize(("n", "p"), [(9, 0.6), (8, 0.7), (15, 0.45)])
def test_the_accuracy_of_a_vote_is_the_binomial_sum(n: int, p: float) -> None:
    source, runs = random.Random(n), 6000
    right = 0
    for _ in range(runs):
        ballot = [voter("r" if source.random() < p else "w") for _ in range(n)]
        right += ballot[majority(ballot)].answer == "r"
    assert close(right / runs, majority_is_right(n, p), runs)


def test_the_accuracy_of_whole_runs_is_the_binomial_sum(tmp_path: Path) -> None:
    source, runs = random.Random(5), 500
    items = [[(5, "r" if source.random() < 0.6 else "w") for _ in range(9)] for _ in range(runs)]
    outcomes = replayed(tmp_path / "votes.jsonl", "self_consistency(samples=9)", items)
    assert close(sum(o.answer == "r" for o in outcomes) / runs, majority_is_right(9, 0.6), runs)


def stops(p: float, most: int, confidence: float) -> dict[tuple[int, int], float]:
    """Probability of each (right, wrong) count at which the Beta rule ends, by a programme over these states."""
    ends: dict[tuple[int, int], float] = {}
    alive = {(0, 0): 1.0}
    for drawn in range(1, most + 1):
        reached: dict[tuple[int, int], float] = {}
        for (right, wrong), chance in alive.items():
            for state, step in (((right + 1, wrong), p), ((right, wrong + 1), 1 - p)):
                reached[state] = reached.get(state, 0.0) + chance * step
        alive = {}
        for state, chance in reached.items():
            over = drawn == most or certainty(*state) >= confidence
            (ends if over else alive)[state] = chance
    return ends


@cache
def certainty(right: int, wrong: int) -> float:
    return posterior(max(right, wrong), min(right, wrong), 400)


def expected(p: float, most: int, confidence: float) -> tuple[float, float]:
    """Error rate and mean number of samples."""
    ends = stops(p, most, confidence)
    assert sum(ends.values()) == pytest.approx(1)
    # A tie at the end goes to the answer that came first: by symmetry the right one half of the time.
    error = sum(c * (0.5 if right == wrong else float(wrong > right)) for (right, wrong), c in ends.items())
    return error, sum(c * (right + wrong) for (right, wrong), c in ends.items())


@pytest.mark.parametrize("p", [0.55, 0.7, 0.9])
def test_stopping_when_confident_errs_as_often_and_as_late_as_it_must(tmp_path: Path, p: float) -> None:
    source, runs, most = random.Random(round(100 * p)), 300, 20
    items = [[(1, "r" if source.random() < p else "w") for _ in range(most)] for _ in range(runs)]
    spec = f"self_consistency(samples={most}, until='confident')"
    outcomes = replayed(tmp_path / "drawn.jsonl", spec, items)
    error, mean = expected(p, most, 0.95)
    assert close(sum(o.answer == "w" for o in outcomes) / runs, error, runs)
    drawn = [len(o.candidates) for o in outcomes]
    variance = sum(c * (r + w - mean) ** 2 for (r, w), c in stops(p, most, 0.95).items())
    assert abs(sum(drawn) / runs - mean) <= 4 * math.sqrt(variance / runs)


def test_the_leader_at_a_stop_is_the_likelier_answer_as_often_as_promised() -> None:
    """With the share of an answer uniform, as the rule supposes, a stop is wrong in at most 5 of 100 cases.

    The share p is integrated out: each state is reached with the chance that the programme gives it at each p.
    """
    grid, wrong, stopped = 200, 0.0, 0.0
    for i in range(grid):
        p = (i + 0.5) / grid
        for (a, b), chance in stops(p, 40, 0.95).items():
            if certainty(a, b) >= 0.95:
                stopped += chance
                wrong += chance * ((a > b) != (p > 0.5))
    assert 0.005 < wrong / stopped <= 0.05


def test_windows_err_as_often_as_they_must(tmp_path: Path) -> None:
    """ESC over two windows of three with shares (p, 1 - p): enumerated over all 64 ballots."""
    p, source, runs = 0.6, random.Random(3), 400
    error = mean = 0.0
    for bits in range(64):
        ballot = ["r" if bits >> i & 1 else "w" for i in range(6)]
        chance = math.prod(p if vote == "r" else 1 - p for vote in ballot)
        seen = ballot[:3] if len(set(ballot[:3])) == 1 else ballot
        rights = seen.count("r")
        elected = ballot[0] if 2 * rights == len(seen) else "r" if 2 * rights > len(seen) else "w"
        error += chance * (elected == "w")
        mean += chance * len(seen)
    items = [[(1, "r" if source.random() < p else "w") for _ in range(6)] for _ in range(runs)]
    outcomes = replayed(tmp_path / "esc.jsonl", "self_consistency(samples=6, window=3, until='unanimous')", items)
    assert close(sum(o.answer == "w" for o in outcomes) / runs, error, runs)
    early = sum(len(o.candidates) == 3 for o in outcomes) / runs
    assert close(early, (6 - mean) / 3, runs)
