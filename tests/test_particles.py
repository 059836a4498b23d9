"""Weights and resampling of particles: laws for any weights, and unbiasedness by simulation."""

from __future__ import annotations

import math
import random
import time
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestra.errors import DegenerateWeights
from orchestra.strategies.particles import (
    MAX_RATIO,
    Resampler,
    draw,
    effective_sample_size,
    log_mean,
    log_sum,
    normalised,
    resample,
)

METHODS: list[Resampler] = ["systematic", "multinomial", "stratified", "residual", "chopthin"]
WEIGHTS = st.lists(st.floats(-40, 40) | st.just(-math.inf), min_size=1, max_size=40).filter(
    lambda values: max(values) > -math.inf
)
SPREAD = [math.log(w) for w in (5.0, 0.2, 1.0, 0.01, 2.5, 0.7, 0.03, 12.0)]
LAWS = settings(max_examples=150, deadline=None)


@LAWS
@given(WEIGHTS)
@example([-900.0, -900.0, -901.0])
@example([800.0, 0.0])
def test_weights_sum_to_one_and_the_effective_sample_size_is_between_one_and_all(log_weights: list[float]) -> None:
    weights = normalised(log_weights)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert all(weight >= 0 for weight in weights)
    size = effective_sample_size(log_weights)
    assert 1 <= size <= len(log_weights)
    assert size == pytest.approx(1 / math.fsum(weight**2 for weight in weights))


@LAWS
@given(WEIGHTS, st.randoms(use_true_random=False))
def test_the_order_of_the_particles_changes_no_estimate(log_weights: list[float], rng: random.Random) -> None:
    order = rng.sample(range(len(log_weights)), len(log_weights))
    moved = [log_weights[i] for i in order]
    assert log_sum(moved) == log_sum(log_weights)
    assert log_mean(moved) == log_mean(log_weights)
    assert effective_sample_size(moved) == effective_sample_size(log_weights)
    weights = normalised(log_weights)
    assert normalised(moved) == [weights[i] for i in order]


@LAWS
@given(WEIGHTS, st.sampled_from(METHODS), st.integers(0, 5))
def test_resampling_keeps_the_number_of_particles_and_their_total_and_none_of_weight_zero(
    log_weights: list[float], method: Resampler, seed: int
) -> None:
    ancestors, new = resample(log_weights, method, random.Random(seed))
    assert len(ancestors) == len(new) == len(log_weights)
    assert ancestors == sorted(ancestors)
    assert all(log_weights[ancestor] > -math.inf for ancestor in ancestors)
    assert log_sum(new) == pytest.approx(log_sum(log_weights), abs=1e-9)
    assert log_mean(new) == pytest.approx(log_mean(log_weights), abs=1e-9)


@LAWS
@given(WEIGHTS, st.integers(0, 5))
def test_copies_are_within_the_bounds_of_the_scheme(log_weights: list[float], seed: int) -> None:
    expected = [len(log_weights) * weight for weight in normalised(log_weights)]

    def copies(method: Resampler) -> list[int]:
        found = Counter(resample(log_weights, method, random.Random(seed)).ancestors)
        return [found[i] for i in range(len(log_weights))]

    for count, value in zip(copies("systematic"), expected, strict=True):
        assert math.floor(value - 1e-9) <= count <= math.ceil(value + 1e-9)
    for count, value in zip(copies("stratified"), expected, strict=True):
        assert abs(count - value) < 2
    for count, value in zip(copies("residual"), expected, strict=True):
        assert count >= math.floor(value - 1e-9)


@LAWS
@given(WEIGHTS, st.integers(0, 5))
@example([math.log(w) for w in (1e-6, 1.0, 1.0, 1.0)], 0)
@example([math.log(w) for w in (1e-6, 1e-6, 1.0, 1.4)], 0)
@example([math.log(w) for w in (1e-3, 1.0, 7.0, 100.0)], 0)
def test_chopthin_bounds_the_ratio_of_weights_and_so_the_effective_sample_size(
    log_weights: list[float], seed: int
) -> None:
    new = resample(log_weights, "chopthin", random.Random(seed)).log_weights
    assert max(new) - min(new) <= math.log(MAX_RATIO) + 1e-9
    assert effective_sample_size(new) >= len(new) / 2 - 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_of_the_copies_sum_to_the_weight_of_their_ancestor_in_expectation(method: Resampler) -> None:
    rng, runs = random.Random(1), 20_000
    sums = [0.0] * len(SPREAD)
    squares = [0.0] * len(SPREAD)
    for _ in range(runs):
        run = [0.0] * len(SPREAD)
        for ancestor, log_weight in zip(*resample(SPREAD, method, rng), strict=True):
            run[ancestor] += math.exp(log_weight)
        for i, value in enumerate(run):
            sums[i] += value
            squares[i] += value**2
    for i, log_weight in enumerate(SPREAD):
        mean = sums[i] / runs
        error = math.sqrt(max(squares[i] / runs - mean**2, 0) / runs)
        assert abs(mean - math.exp(log_weight)) <= 4 * error + 1e-9, (i, mean, error)


@pytest.mark.parametrize("method", METHODS)
def test_resampling_is_a_function_of_the_random_state(method: Resampler) -> None:
    first = resample(SPREAD, method, random.Random(3))
    assert resample(SPREAD, method, random.Random(3)) == first
    assert any(resample(SPREAD, method, random.Random(seed)) != first for seed in range(20))


def test_chopthin_leaves_weights_alone_that_are_close_to_each_other() -> None:
    even = [math.log(w) for w in (1.0, 2.0, 1.5, 2.2)]
    ancestors, new = resample(even, "chopthin", random.Random(0))
    assert ancestors == [0, 1, 2, 3]
    assert new == pytest.approx(even)


def test_one_particle_is_drawn_by_weight() -> None:
    rng, runs = random.Random(0), 20_000
    log_weights = [math.log(0.5), -math.inf, math.log(2.0), math.log(1.5), -math.inf]
    found = Counter(draw(log_weights, rng) for _ in range(runs))
    for index, weight in enumerate(normalised(log_weights)):
        assert abs(found[index] / runs - weight) <= 4 * math.sqrt(weight * (1 - weight) / runs)


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_all_zero_or_no_numbers_are_refused(method: Resampler) -> None:
    dead = [-math.inf, -math.inf]
    assert log_sum(dead) == log_mean(dead) == -math.inf
    assert effective_sample_size(dead) == 0
    for refused in (normalised, lambda w: draw(w, random.Random()), lambda w: resample(w, method, random.Random())):
        with pytest.raises(DegenerateWeights, match="all 2 particles have weight zero"):
            refused(dead)
        for wrong in (math.nan, math.inf):
            with pytest.raises(DegenerateWeights, match="infinite or not a number"):
                refused([0.0, wrong])


@pytest.mark.parametrize("method", METHODS)
def test_thousands_of_particles_are_resampled_in_milliseconds(method: Resampler) -> None:
    rng = random.Random(0)
    log_weights = [rng.gauss(0, 3) for _ in range(4096)]
    begun = time.process_time()
    resample(log_weights, method, rng)
    assert time.process_time() - begun < 0.25
