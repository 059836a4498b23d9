"""How sure a model was of what it wrote, from the alternatives at each token (Fu et al. 2025, arXiv 2508.15260)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Literal

from orchestra.runtime.engine import Delta

Measure = Literal["lowest", "tail", "bottom", "mean"]

_UNIT = 2.0**-32  # nats: a sliding sum of whole units is exact, however long the trace is
_MOST = 2.0**20  # nats: an alternative that is impossible makes a token very sure, not infinitely


class Confidence:
    """The token confidences of one trace, as they come: a constant amount of work a token, and eight bytes kept.

    The confidence of a token is the mean of -log p over its most likely alternatives: large where the model put all on
    one. That of a group is the mean over `window` consecutive tokens.

    Args:
        window: tokens of a group.
        floor: group confidence (nats) below which the trace is given up.

    Attributes:
        fell: whether the confidence of a group fell below the floor. A trace shorter than a group never does.
    """

    def __init__(self, window: int, floor: float = -math.inf) -> None:
        self.fell = False
        self._window = window
        self._floor = floor
        self._tokens = array("q")
        self._sum = 0  # of the last `window` tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def watch(self, delta: Delta) -> bool:
        """Take in what was decoded; whether to stop."""
        for alternatives in delta.top:
            if alternatives:
                self._add(-sum(alternatives.values()) / len(alternatives))
        return self.fell

    def _add(self, confidence: float) -> None:
        token = round(min(confidence, _MOST) / _UNIT)
        self._tokens.append(token)
        self._sum += token
        if len(self) > self._window:
            self._sum -= self._tokens[-1 - self._window]
        if len(self) >= self._window and self._mean(self._sum, self._window) < self._floor:
            self.fell = True

    @staticmethod
    def _mean(units: int, count: int) -> float:
        return units / count * _UNIT if count else 0.0

    def _groups(self) -> Iterator[int]:
        """The sum of each group."""
        units = sum(self._tokens[: self._window])
        yield units
        for old, new in zip(self._tokens, self._tokens[self._window :], strict=False):
            units += new - old
            yield units

    def measure(self, which: Measure) -> float:
        """The confidence of the whole trace (nats); 0 for one without tokens.

        Args:
            which: `mean` of all tokens; of the `tail`: the last `window` tokens; of the `lowest` group; of the
                `bottom` tenth of the groups (at least one). A trace shorter than a group is one group.
        """
        count = min(self._window, len(self))
        if which == "mean":
            return self._mean(sum(self._tokens), len(self))
        if which == "tail":
            return self._mean(sum(self._tokens[-count:]), count)
        if which == "lowest":
            return self._mean(min(self._groups()), count)
        groups = sorted(self._groups())
        bottom = groups[: max(1, len(groups) // 10)]
        return self._mean(sum(bottom), count * len(bottom))


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a `share` of at least one value lies below, linear between two of them."""
    ranked = sorted(values)
    at = share * (len(ranked) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return min(ranked[high], ranked[low] + (ranked[high] - ranked[low]) * (at - low))  # rounding must not pass it
