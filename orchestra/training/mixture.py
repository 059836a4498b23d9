"""The batches of the embedded model's training: which demonstrations, with which loss weights, in which order.

`Mixture.batch(step)` is a function of the seed and the step alone, so a resumed run sees what an uninterrupted one
would have seen. Batches hold a budget of tokens, not a count of sequences, and sequences of like length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import count

from orchestra.evaluation.countdown import Instance, Split, moves, reachable, stream
from orchestra.training import demonstrations
from orchestra.training.demonstrations import Demonstration
from orchestra.training.flatten import Row
from orchestra.training.tokenizer import BOS, EOS, IDS, encode

CYCLE = ("spawn_join", "serial", "spawn_join", "serial", "three")
"""What the batches hold, in turn: equal tokens of both behaviours on four numbers, and short problems for marks."""
POOL = 16
"""Batches that are drawn, sorted by length and cut together."""

HIT, MISS, ANSWER = IDS["hit"], IDS["miss"], IDS["answer:"]


@dataclass(frozen=True)
class Weights:
    """Loss weights of tokens; what the model is given weighs nothing.

    `plan` is of outlines and sub-queries, `choice` of whose result is repeated after a join.
    """

    hit: float = 6.0
    miss: float = 2.0
    answer: float = 4.0
    other: float = 1.0
    plan: float = 1.0
    choice: float = 4.0


WEIGHTS = tuple(one.name for one in fields(Weights))
"""Their names."""


def row(demonstration: Demonstration, weights: Weights) -> Row:
    """Token ids with begin and end token, and what each weighs in the loss (everything after an answer tag more)."""
    ids, values, answering = [BOS], [0.0], False
    for text, learn in demonstration.segments:
        for token in encode(text):
            ids.append(token)
            if not learn:
                values.append(0.0)
            elif answering:
                values.append(weights.answer)
            else:
                values.append({HIT: weights.hit, MISS: weights.miss}.get(token, weights.other))
                answering = token == ANSWER
    return Row.sequence([*ids, EOS], [*values, weights.answer])


class Mixture:
    """Training batches by step.

    Args:
        seed: Fixes every batch.
        tokens: Budget of a batch, padding included (a longer sequence is a batch of its own).
        levels: Level names and their shares of the four-number problems.
        unsolvable: Share of small problems without a solution (the model must be able to give up).
        conditioned: Share of parents that are told how many children a round may have.
        most_children: The largest such number.
        weights: Loss weights.
        longest: Sequences above this are left out.
        split: Of the four-number problems.
    """

    def __init__(
        self,
        seed: int,
        tokens: int,
        levels: dict[str, float],
        *,
        unsolvable: float = 0.04,
        conditioned: float = 0.25,
        most_children: int = 16,
        weights: Weights | None = None,
        longest: int = 4096,
        split: Split = "train",
    ) -> None:
        self.seed, self.tokens, self.levels = seed, tokens, levels
        self.unsolvable, self.conditioned, self.most_children = unsolvable, conditioned, most_children
        self.weights = weights or Weights()
        self.longest, self.split = longest, split
        # Two pools of each kind cover a sequential pass; a resumed one rebuilds only the pool that it is in.
        self._pool = lru_cache(maxsize=2 * len(set(CYCLE)))(self._make_pool)

    def batch(self, step: int) -> list[Row]:
        """The batch of one optimiser step."""
        cycle, place = divmod(step, len(CYCLE))
        kind = CYCLE[place]
        return self.nth(kind, cycle * CYCLE.count(kind) + CYCLE[:place].count(kind))

    def nth(self, kind: str, index: int) -> list[Row]:
        """A batch of one kind."""
        return self._pool(kind, index // POOL)[index % POOL]

    def _make_pool(self, kind: str, number: int) -> list[list[Row]]:
        rng = random.Random(f"mixture/{self.seed}/{kind}/{number}")
        rows: list[Row] = []
        batches: list[list[Row]] = []
        total, wanted = 0, POOL * self.tokens
        for demonstration in self._demonstrations(kind, rng):
            made = row(demonstration, self.weights)
            if len(made) > self.longest:
                continue
            rows.append(made)
            total += len(made)
            if total >= wanted:
                batches = cut(rows, self.tokens)
                if len(batches) >= POOL:
                    break
                wanted += self.tokens
        rng.shuffle(batches)
        return batches[:POOL]

    def _demonstrations(self, kind: str, rng: random.Random) -> Iterator[Demonstration]:
        instances = self._instances(rng)
        for index in count():
            instance = next(instances)
            if kind == "serial":
                yield demonstrations.serial(instance, rng)
            elif kind == "spawn_join":
                children = rng.randint(1, self.most_children) if rng.random() < self.conditioned else None
                yield demonstrations.spawn_join(instance, rng, children)[0]
                yield from demonstrations.balanced_children(instance, rng)
            else:
                left = rng.choice(moves(instance.numbers)).left
                # Two of three have a solution: hits must not be rare.
                targets = reachable(left)
                yield demonstrations.three(left, rng.choice(targets) if index % 3 and targets else instance.target)

    def _instances(self, rng: random.Random) -> Iterator[Instance]:
        solvable = {level: stream(level, self.split, rng) for level in self.levels}
        unsolvable = stream("small", self.split, rng, solvable=False)
        names, shares = list(self.levels), list(self.levels.values())
        while True:
            level = rng.choices(names, shares)[0]
            if level == "small" and rng.random() < self.unsolvable:
                yield next(unsolvable)
            else:
                yield next(solvable[level])


def cut(rows: Sequence[Row], tokens: int) -> list[list[Row]]:
    """Batches of like length that hold `tokens` with their padding, as nearly as whole rows can on average."""
    batches: list[list[Row]] = []
    for made in sorted(rows, key=len):
        # Ascending order: the newest row is the longest of its batch. Rounding to the nearest row rather than down
        # gives long sequences (serial search) the same tokens a batch as short ones.
        if batches and (len(batches[-1]) + 0.5) * len(made) <= tokens:
            batches[-1].append(made)
        else:
            batches.append([made])
    return batches
