"""Batches of rows from data sets: which rows a step is trained on, as a function of the seed and the step alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from orchestra.training.flatten import Row


@dataclass(frozen=True)
class Rows:
    """Rows of one source.

    Attributes:
        columns: data set of row columns (`Row.columns`); with the prefix `plain.` also those of the plain rendering.
        share: part of an epoch's rows, relative to other sources; None: as many as there are.
    """

    columns: Any
    share: float | None = None

    def __len__(self) -> int:
        return len(self.columns)

    def row(self, index: int, plain: bool = False) -> Row:
        """One row, in the rendering that is asked for."""
        columns = self.columns[index]
        if plain:
            columns = {name: columns[f"plain.{name}"] for name in columns if f"plain.{name}" in columns}
        return Row.from_columns(columns)

    def select(self, indices: Sequence[int]) -> Rows:
        """Some of the rows."""
        return Rows(self.columns.select(indices), self.share)


@dataclass(frozen=True)
class Schedule:
    """The share of parallel renderings, which goes in a straight line from the first step to the last.

    Attributes:
        first, last: the share at the first and at the last step.
        steps: of the run.
    """

    first: float = 1.0
    last: float = 1.0
    steps: int = 1

    def share(self, step: int) -> float:
        """Probability that a row of this step is rendered parallel."""
        return self.first + (self.last - self.first) * step / max(self.steps - 1, 1)


class RowBatches:
    """Batches of equal numbers of rows; every row is seen once an epoch, if the sources have no shares.

    Args:
        sources: where rows come from.
        rows: of a batch.
        seed: fixes the order, and which rendering each row has.
        shuffle: whether each epoch has an order of its own; else it is that of the sources.
        schedule: how many are rendered parallel.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        rows: int,
        seed: int,
        *,
        shuffle: bool = True,
        schedule: Schedule | None = None,
    ) -> None:
        self._sources, self._rows, self._seed, self._shuffle = sources, rows, seed, shuffle
        self._schedule = schedule or Schedule()
        counts = [len(source) for source in sources]
        total = sum(counts)
        shares = [
            count / total if source.share is None else source.share
            for source, count in zip(sources, counts, strict=True)
        ]
        self._quotas = [max(1, round(total * share / sum(shares))) for share in shares]
        self._epoch = lru_cache(maxsize=2)(self._order)

    @property
    def epoch(self) -> int:
        """Rows of an epoch."""
        return sum(self._quotas)

    def choose(self, step: int) -> list[tuple[int, int, bool]]:
        """The rows of a batch: source, index in it, and whether it is rendered as plain text."""
        source = random.Random(f"{self._seed}/rendering/{step}")
        share = self._schedule.share(step)
        chosen = []
        for place in range(step * self._rows, (step + 1) * self._rows):
            epoch, index = divmod(place, self.epoch)
            chosen.append((*self._epoch(epoch)[index], source.random() >= share))
        return chosen

    def batch(self, step: int) -> list[Row]:
        """The batch of one optimiser step."""
        return [self._sources[source].row(index, plain) for source, index, plain in self.choose(step)]

    def _order(self, epoch: int) -> list[tuple[int, int]]:
        """Source and index of each row of an epoch. A source with a share goes on where the last epoch left it."""
        order = []
        for number, (source, quota) in enumerate(zip(self._sources, self._quotas, strict=True)):
            size = len(source)
            for place in range(epoch * quota, (epoch + 1) * quota):
                round_, index = divmod(place, size)
                order.append((number, self._shuffled(number, round_, size)[index]))
        if self._shuffle:
            random.Random(f"{self._seed}/epoch/{epoch}").shuffle(order)
        return order

    @lru_cache(maxsize=16)  # noqa: B019  # lives as long as the run
    def _shuffled(self, source: int, round_: int, size: int) -> Sequence[int]:
        if not self._shuffle:
            return range(size)
        indices = list(range(size))
        random.Random(f"{self._seed}/source/{source}/{round_}").shuffle(indices)
        return indices


def hold_out(sources: Sequence[Rows], count: int, seed: int) -> tuple[list[Rows], list[Row]]:
    """Take `count` rows out of the sources, in proportion to their sizes: the sources without them, and the rows.

    Raises:
        ValueError: there are not more rows than that.
    """
    total = sum(map(len, sources))
    if count >= total:
        raise ValueError(f"held_out: {count} of {total} rows leaves none to learn from")
    left: list[Rows] = []
    rows: list[Row] = []
    for number, source in enumerate(sources):
        indices = list(range(len(source)))
        random.Random(f"{seed}/held-out/{number}").shuffle(indices)
        taken = math.ceil(count * len(source) / total) if count else 0
        taken = min(taken, count - len(rows), len(source) - 1)
        rows += [source.row(index) for index in sorted(indices[:taken])]
        left.append(source.select(sorted(indices[taken:])))
    return left, rows
