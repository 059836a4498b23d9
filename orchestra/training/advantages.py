"""Advantages of rollouts, and how much each of their tokens counts. Pure functions of numbers; nothing is loaded."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

from orchestra.errors import UsageError
from orchestra.training.flatten import Row

Scale = Literal["group", "none", "batch"]
"""What centred rewards are divided by: the standard deviation of their group (GRPO, arXiv:2402.03300), nothing
(ThreadWeaver, arXiv:2512.07843; Dr. GRPO), or that of the whole batch (NPR, arXiv:2512.07461)."""

Mean = Literal["calls", "tokens"]
"""What a loss is the mean of; see `shares`."""

EPSILON = 1e-4
"""Added to a standard deviation, as TRL does."""


def advantages(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    scale: Scale = "group",
    *,
    batch: Sequence[float] | None = None,
) -> list[float]:
    """The advantage of each rollout: its reward less the mean of its group, scaled.

    Args:
        rewards: one each.
        groups: the group of each: rollouts of one prompt. Groups may have different sizes; alone in one it is 0.
        scale: see `Scale`. Standard deviations are those of samples (n - 1), as in TRL.
        batch: the rewards of the whole batch, if they are more than these (several processes).

    Raises:
        UsageError: an unknown scale.
    """
    if scale not in ("group", "none", "batch"):
        raise UsageError(f"advantages are scaled by group, none or batch, not {scale!r}")
    of: dict[Hashable, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        of.setdefault(group, []).append(reward)
    means = {group: statistics.fmean(all_) for group, all_ in of.items()}
    spread = {group: _deviation(all_) if scale == "group" else 1.0 for group, all_ in of.items()}
    if scale == "batch":
        spread = dict.fromkeys(of, _deviation(rewards if batch is None else batch))
    epsilon = 0.0 if scale == "none" else EPSILON
    return [(reward - means[group]) / (spread[group] + epsilon) for reward, group in zip(rewards, groups, strict=True)]


def _deviation(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    mean = statistics.fmean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def calls(row: Row) -> Counter[int]:
    """The model calls of a rollout and how many tokens each sampled: nodes with sampled tokens, of all its threads."""
    return Counter(node for node, weight in zip(row.nodes, row.weights, strict=True) if weight > 0)


def shares(row: Row, mean: Mean) -> tuple[list[float], float]:
    """How much each entry of a row counts in a batch's loss before that is divided by the batch's units, and its units.

    - `calls` (APR, arXiv:2504.15466): the mean over the tokens of each call, divided by the number of calls of the
      rollout; the batch's sum is divided by its number of calls.
    - `tokens` (ThreadWeaver, arXiv:2512.07843): each sampled token counts once; the sum is divided by their number.

    Args:
        row: a rollout.
        mean: which.

    Returns:
        A share for each entry (0 for what was not sampled), and the row's calls or tokens.

    Raises:
        UsageError: an unknown mean.
    """
    sampled = [float(weight > 0) for weight in row.weights]
    if mean == "tokens":
        return sampled, sum(sampled)
    if mean != "calls":
        raise UsageError(f"a loss is a mean over calls or tokens, not {mean!r}")
    lengths = calls(row)
    per_call = {node: 1 / (length * len(lengths)) for node, length in lengths.items()}
    return [of * per_call.get(node, 0.0) for of, node in zip(sampled, row.nodes, strict=True)], float(len(lengths))
