"""Statistics of repeated samples of items: errors clustered by item, votes, pass@k, paired differences.

Samples of one item are not independent, so every error here treats the item as the unit that was drawn
(Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

Clusters = Mapping[str, Sequence[float]]
"""The values of all samples of each item."""


class Estimate(NamedTuple):
    """A mean and its standard error; nan where there is nothing to tell it from."""

    mean: float
    stderr: float


class Difference(NamedTuple):
    """Mean of `b - a` over common items, with its standard error and 95 % interval."""

    mean: float
    stderr: float
    low: float
    high: float
    items: int


class ClusteredMean:
    """The mean over all samples and its clustered standard error, kept up to date sample by sample."""

    def __init__(self) -> None:
        self._clusters: dict[str, tuple[float, int]] = {}
        self._sum = self._count = self._sum_sum = self._sum_count = self._count_count = 0.0

    def add(self, item: str, value: float) -> None:
        """Add one sample of `item`."""
        total, count = self._clusters.get(item, (0.0, 0))
        self._clusters[item] = (total + value, count + 1)
        self._sum += value
        self._count += 1
        self._sum_sum += 2 * total * value + value * value
        self._sum_count += total + value * (count + 1)
        self._count_count += 2 * count + 1

    @property
    def estimate(self) -> Estimate:
        """Mean and standard error; the error is nan for fewer than two items."""
        items = len(self._clusters)
        if not items:
            return Estimate(math.nan, math.nan)
        mean = self._sum / self._count
        if items < 2:
            return Estimate(mean, math.nan)
        # The sum over items of (total - count * mean)^2, multiplied out, times the number of samples squared: for
        # grades of 0 and 1 every term is then a whole number, and nothing is lost when they cancel.
        n, total = self._count, self._sum
        squares = n * n * self._sum_sum - 2 * total * n * self._sum_count + total * total * self._count_count
        return Estimate(mean, math.sqrt(max(0.0, squares) * items / (items - 1)) / (n * n))


def clustered_mean(clusters: Clusters) -> Estimate:
    """Mean over all samples with the standard error clustered by item."""
    running = ClusteredMean()
    for item, values in clusters.items():
        for value in values:
            running.add(item, value)
    return running.estimate


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` samples drawn without replacement is correct: unbiased pass@k.

    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1.

    Raises:
        ValueError: not 0 <= correct <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= correct <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@k needs 0 <= correct <= samples and 1 <= k <= samples: {correct}, {samples}, {k}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean_pass_at_k(clusters: Clusters, k: int) -> float:
    """Mean pass@k over the items that have at least `k` samples; nan if none has."""
    values = [pass_at_k(len(v), sum(x > 0 for x in v), k) for v in clusters.values() if len(v) >= k]
    return sum(values) / len(values) if values else math.nan


def majority_correct(votes: Iterable[tuple[str | None, float]]) -> float:
    """Whether the most frequent answer is correct, from `(answer, correct)` pairs of one item.

    No answer is no vote. Ties count as the mean over the tied answers, so the order of samples does not matter.
    """
    counts: Counter[str] = Counter()
    verdicts: dict[str, list[float]] = {}
    for answer, correct in votes:
        if answer is not None:
            counts[answer] += 1
            verdicts.setdefault(answer, []).append(correct)
    if not counts:
        return 0.0
    most = max(counts.values())
    tied = [sum(v) / len(v) for answer, v in verdicts.items() if counts[answer] == most]
    return sum(tied) / len(tied)


def paired_difference(a: Clusters, b: Clusters) -> Difference:
    """Mean of `b - a` over the items that both have, each item weighing the same.

    Pairing removes the spread of the items' difficulty, which both runs share. The interval is Student's t.
    """
    common = [item for item in a if item in b and a[item] and b[item]]
    n = len(common)
    if not n:
        return Difference(math.nan, math.nan, math.nan, math.nan, 0)
    differences = [sum(b[i]) / len(b[i]) - sum(a[i]) / len(a[i]) for i in common]
    mean = sum(differences) / n
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan, n)
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = t_quantile(0.975, n - 1) * stderr
    return Difference(mean, stderr, mean - half, mean + half, n)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t: exact for one and two degrees of freedom, else within 0.5 % (0.01 % from ten on).

    Source: Abramowitz and Stegun 26.7.5, an expansion around the normal quantile; it spares a dependency on scipy.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom) ** (i + 1) for i, term in enumerate(terms))


def percentile(values: Iterable[float], share: float) -> float:
    """The `share` quantile with linear interpolation; nan of nothing."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Iterable[float]) -> float:
    """The mean; nan of nothing."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan
