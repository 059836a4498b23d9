"""Weighted particles: sums of log weights, effective sample size, resampling, and the draw of one.

Weights are natural logarithms, -inf for a particle that cannot be. Sums are exactly rounded (`math.fsum`), so that the
order of the particles changes no estimate.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

from orchestra.errors import DegenerateWeights

Resampler = Literal["systematic", "multinomial", "stratified", "residual", "chopthin"]

MAX_RATIO = 3 + math.sqrt(8)
"""Of the largest weight to the smallest after `chopthin`; keeps the effective sample size at N/2 or more."""


class Resampled(NamedTuple):
    """What resampling leaves.

    Attributes:
        ancestors: of each of the N new particles, the index of the old one that it is a copy of; ascending.
        log_weights: of the new particles; the weights sum to what the old ones summed to.
    """

    ancestors: list[int]
    log_weights: list[float]


def log_sum(log_weights: Sequence[float]) -> float:
    """The logarithm of the sum of the weights; -inf if all are zero, or there are none.

    Raises:
        DegenerateWeights: a weight is infinite or not a number.
    """
    weights, top = _scaled(log_weights)
    return top + math.log(math.fsum(weights)) if math.isfinite(top) else -math.inf


def log_mean(log_weights: Sequence[float]) -> float:
    """The logarithm of the mean weight: after a pass of importance weighting, the estimate of the evidence.

    Raises:
        DegenerateWeights: a weight is infinite or not a number.
    """
    return log_sum(log_weights) - math.log(len(log_weights))


def normalised(log_weights: Sequence[float]) -> list[float]:
    """The weights as probabilities.

    Raises:
        DegenerateWeights: all are zero, or one is infinite or not a number.
    """
    weights = _weights(log_weights)
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def effective_sample_size(log_weights: Sequence[float]) -> float:
    """(sum w)^2 / sum w^2, from 1 to N (Kong 1992); 0 if all weights are zero: then there is no sample at all.

    Raises:
        DegenerateWeights: a weight is infinite or not a number.
    """
    weights, top = _scaled(log_weights)
    if not math.isfinite(top):
        return 0.0
    size = math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
    return min(max(size, 1.0), float(len(weights)))


def draw(log_weights: Sequence[float], rng: random.Random) -> int:
    """The index of one particle, drawn by weight.

    Raises:
        DegenerateWeights: all are zero, or one is infinite or not a number.
    """
    weights = _weights(log_weights)
    return _at(weights, [rng.random() * sum(weights)])[0]


def resample(log_weights: Sequence[float], method: Resampler, rng: random.Random) -> Resampled:
    """As many particles as there were, copies of the old ones, none of weight zero.

    Every method is unbiased: the weights of a particle's copies sum to its own weight in expectation. All but
    `chopthin` give equal weights, and `c = N w / sum w` copies in expectation:

    - `systematic`: one uniform number for all (Carpenter et al. 1999); floor(c) or ceil(c) copies.
    - `stratified`: one uniform number for each Nth of the weight (Kitagawa 1996); less than two away from c.
    - `residual`: floor(c) copies, what is left by `multinomial` (Liu & Chen 1998).
    - `multinomial`: N independent draws (Gordon et al. 1993).
    - `chopthin`: small weights are thinned to copies of one weight, large ones chopped into equal parts, those between
      are left alone, and no new weight is more than `MAX_RATIO` times another (Gandy & Lau 2016, arXiv 1502.07396).

    Raises:
        DegenerateWeights: all weights are zero, or one is infinite or not a number.
    """
    weights = _weights(log_weights)
    if method == "chopthin":
        return _chopthin(weights, max(log_weights), rng)
    ancestors = _residual(weights, rng) if method == "residual" else _equal(weights, len(weights), method, rng)
    return Resampled(ancestors, [log_mean(log_weights)] * len(weights))


def _scaled(log_weights: Sequence[float]) -> tuple[list[float], float]:
    """Weights as parts of the largest, and the logarithm of that."""
    if any(math.isnan(value) or value == math.inf for value in log_weights):
        raise DegenerateWeights("a particle's weight is infinite or not a number")
    top = max(log_weights, default=-math.inf)
    return [math.exp(value - top) if top > -math.inf else 0.0 for value in log_weights], top


def _weights(log_weights: Sequence[float]) -> list[float]:
    weights, top = _scaled(log_weights)
    if top == -math.inf:
        raise DegenerateWeights(f"all {len(weights)} particles have weight zero")
    return weights


def _at(weights: Sequence[float], positions: Iterable[float]) -> list[int]:
    """For each position, ascending from 0 to the sum of the weights, the index of the weight that it falls on."""
    ends = list(accumulate(weights))
    last = max(index for index, weight in enumerate(weights) if weight > 0)
    found, index = [], 0
    for position in positions:
        while index < last and ends[index] <= position:
            index += 1
        found.append(index)
    return found


def _equal(weights: Sequence[float], count: int, method: Resampler, rng: random.Random) -> list[int]:
    """Ancestors of `count` particles of equal weight."""
    if method == "multinomial":
        uniforms = sorted(rng.random() for _ in range(count))
    elif method == "stratified":
        uniforms = [(index + rng.random()) / count for index in range(count)]
    else:
        offset = rng.random()
        uniforms = [(index + offset) / count for index in range(count)]
    total = sum(weights)  # summed as the walk sums, so that no position lies past the end
    return _at(weights, (uniform * total for uniform in uniforms))


def _residual(weights: Sequence[float], rng: random.Random) -> list[int]:
    total, size = math.fsum(weights), len(weights)
    expected = [size * weight / total for weight in weights]
    copies = [math.floor(value) for value in expected]
    left = size - sum(copies)
    if left > 0:
        rest = [value - count for value, count in zip(expected, copies, strict=True)]
        for index in _equal(rest, left, "multinomial", rng):
            copies[index] += 1
    return [index for index, count in enumerate(copies) for _ in range(count)]


def _chopthin(weights: Sequence[float], top: float, rng: random.Random) -> Resampled:
    """Thinned particles form one pool, which is resampled; every other particle is split into equal parts.

    Gandy & Lau let chance round how many the pool leaves, so that the sum of the weights holds only in expectation.
    Here that number is rounded down, the pool's weight is shared out evenly among those that remain, and what is
    missing to N goes, one by one, to the parts that are heaviest: the sum holds exactly, and so do the bounds. (The
    pool's weights are then between one and two thresholds; a part is cut only while it is heavier than half of
    MAX_RATIO thresholds, as the heaviest must be if there are fewer than N.)
    """
    order = sorted(range(len(weights)), key=weights.__getitem__)
    ascending = [weights[index] for index in order]
    thinned, remain = _threshold(ascending)
    if thinned and not remain:  # not worth a particle of its own: thinned together with the next
        thinned, remain = thinned + 1, 1
    groups = [order[:thinned]] if thinned else []
    groups += [[index] for index in order[thinned:]]
    totals = [math.fsum(weights[index] for index in group) for group in groups]
    copies = [remain if thinned else 1] + [1] * (len(groups) - 1)
    heaviest = [(-total / count, place) for place, (total, count) in enumerate(zip(totals, copies, strict=True))]
    heapq.heapify(heaviest)
    for _ in range(len(weights) - sum(copies)):
        _, place = heaviest[0]
        copies[place] += 1
        heapq.heapreplace(heaviest, (-totals[place] / copies[place], place))
    found: list[tuple[int, float]] = []
    for group, total, count in zip(groups, totals, copies, strict=True):
        drawn = _equal([weights[index] for index in group], count, "systematic", rng)
        found += [(group[index], top + math.log(total / count)) for index in drawn]
    found.sort()
    return Resampled([index for index, _ in found], [log_weight for _, log_weight in found])


def _threshold(ascending: Sequence[float]) -> tuple[int, int]:
    """How many weights are below the threshold `a`, and how many particles they leave.

    `a` is where the expected numbers of offspring add up to N: w/a below it, 1 from there to a MAX_RATIO / 2, and
    w / (a MAX_RATIO / 2) above (Gandy & Lau, section 3).
    """
    size = len(ascending)
    below = [0.0, *accumulate(ascending)]
    above = [0.0, *accumulate(reversed(ascending))]

    def parts(a: float) -> tuple[int, int, float, float]:
        thin, chop = bisect_left(ascending, a), size - bisect_left(ascending, a * MAX_RATIO / 2)
        return thin, size - thin - chop, below[thin], above[chop] * 2 / MAX_RATIO

    low, high = below[-1] / size / MAX_RATIO, ascending[-1]  # at least N offspring; at most N
    while (middle := (low + high) / 2) not in (low, high):
        _, alone, thin, chop = parts(middle)
        low, high = (middle, high) if alone + (thin + chop) / middle > size else (low, middle)
    count, alone, thin, chop = parts(high)
    return count, math.floor(thin / high + 1e-9) if chop else size - alone
