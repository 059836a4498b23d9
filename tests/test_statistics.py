"""Statistics against closed forms, enumeration and simulation."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestra.evaluation.statistics import (
    ClusteredMean,
    clustered_mean,
    majority_correct,
    mean,
    mean_pass_at_k,
    paired_difference,
    pass_at_k,
    percentile,
    t_quantile,
)


def direct(clusters: dict[str, list[float]]) -> float:
    """The clustered standard error, written down as in its definition."""
    values = [v for vs in clusters.values() for v in vs]
    centre = sum(values) / len(values)
    squares = sum(sum(v - centre for v in vs) ** 2 for vs in clusters.values())
    n = len(clusters)
    return math.sqrt(squares * n / (n - 1)) / len(values)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=5), min_size=2, max_size=12))
@example([[0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0, 1.0]])  # no spread between items: the terms cancel
def test_clustered_error_equals_its_definition(data: list[list[float]]) -> None:
    clusters = {str(i): values for i, values in enumerate(data)}
    estimate = clustered_mean(clusters)
    assert estimate.mean == pytest.approx(mean(v for vs in data for v in vs))
    assert estimate.stderr == pytest.approx(direct(clusters), abs=1e-9)


def test_one_sample_an_item_is_the_textbook_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    estimate = clustered_mean({str(i): [v] for i, v in enumerate(values)})
    assert estimate.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


def test_order_of_samples_does_not_matter() -> None:
    rng = random.Random(0)
    samples = [(str(i % 7), float(rng.random() < 0.4)) for i in range(60)]
    estimates = []
    for _ in range(5):
        rng.shuffle(samples)
        running = ClusteredMean()
        for item, value in samples:
            running.add(item, value)
        estimates.append(running.estimate)
    assert all(e == pytest.approx(estimates[0]) for e in estimates)


def test_nothing_and_one_item() -> None:
    assert math.isnan(clustered_mean({}).mean)
    one = clustered_mean({"a": [1.0, 0.0]})
    assert one.mean == 0.5
    assert math.isnan(one.stderr)


def test_interval_covers_when_samples_of_an_item_are_alike() -> None:
    rng = random.Random(3)
    naive = covered = 0
    runs = 400
    for _ in range(runs):
        chances = [rng.betavariate(0.6, 0.4) for _ in range(60)]
        clusters = {str(i): [float(rng.random() < c) for _ in range(8)] for i, c in enumerate(chances)}
        estimate = clustered_mean(clusters)
        half = t_quantile(0.975, 59) * estimate.stderr
        covered += abs(estimate.mean - 0.6) <= half
        flat = [v for vs in clusters.values() for v in vs]
        naive += abs(estimate.mean - 0.6) <= 1.96 * statistics.stdev(flat) / math.sqrt(len(flat))
    assert 0.92 <= covered / runs <= 0.98
    assert naive / runs < 0.8  # what ignoring the clusters would have claimed


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_enumeration(n: int) -> None:
    for correct in range(n + 1):
        samples = [1] * correct + [0] * (n - correct)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(any(d) for d in draws) / len(draws))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_pass_at_k_refuses_what_cannot_be(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@k needs"):
        pass_at_k(n, c, k)


def test_pass_at_k_skips_items_with_too_few_samples() -> None:
    clusters = {"a": [1.0, 0.0], "b": [1.0]}
    assert mean_pass_at_k(clusters, 2) == 1.0
    assert math.isnan(mean_pass_at_k(clusters, 3))


def test_majority() -> None:
    assert majority_correct([("5", 1.0), ("7", 0.0), ("5", 1.0)]) == 1.0
    assert majority_correct([("5", 1.0), ("7", 0.0), ("7", 0.0)]) == 0.0
    assert majority_correct([("5", 1.0), ("7", 0.0)]) == 0.5  # a tie, whatever the order
    assert majority_correct([(None, 0.0), (None, 0.0), ("5", 1.0)]) == 1.0
    assert majority_correct([(None, 0.0)]) == 0.0


def test_paired_difference_takes_out_what_items_share() -> None:
    rng = random.Random(5)
    difficulty = {str(i): rng.random() for i in range(200)}
    a = {i: [d, d] for i, d in difficulty.items()}
    b = {i: [d + 0.1] for i, d in difficulty.items()} | {"only b": [1.0]}
    found = paired_difference(a, b)
    assert found.items == 200
    assert found.mean == pytest.approx(0.1)
    assert found.stderr == pytest.approx(0, abs=1e-9)
    c = {i: [d + rng.gauss(0.1, 0.2)] for i, d in difficulty.items()}
    found = paired_difference(a, c)
    differences = [c[i][0] - a[i][0] for i in a]
    assert found.stderr == pytest.approx(statistics.stdev(differences) / math.sqrt(200))
    assert found.low < found.mean < found.high
    assert found.high - found.mean == pytest.approx(1.97196 * found.stderr, rel=1e-4)


def test_paired_difference_without_common_items() -> None:
    assert paired_difference({"a": [1.0]}, {"b": [1.0]}).items == 0


# From the published table of Student's distribution, two-sided 95 %.
@pytest.mark.parametrize(
    ("freedom", "expected", "tolerance"),
    [
        (1, 12.7062, 1e-5),
        (2, 4.30265, 1e-5),
        (3, 3.18245, 5e-3),
        (5, 2.57058, 1e-3),
        (10, 2.22814, 1e-4),
        (30, 2.04227, 1e-5),
    ],
)
def test_t_quantile(freedom: int, expected: float, tolerance: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=tolerance)
    assert t_quantile(0.025, freedom) == pytest.approx(-expected, rel=tolerance)


def test_percentile() -> None:
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(101), 0.95) == 95
    assert percentile([1, 2], 0.75) == 1.75
    assert percentile([7], 0.95) == 7
    assert math.isnan(percentile([], 0.5))
