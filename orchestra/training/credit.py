"""From rollouts to what a trainer learns from: rows, their advantages, and how much each token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from orchestra.graph import ThreadGraph
from orchestra.outcome import Outcome
from orchestra.training.flatten import Row, flatten
from orchestra.training.pieces import families, select


@dataclass(slots=True)
class Lesson:
    """A rollout as a trainer sees it; all lists have an entry per token of the row.

    Attributes:
        row: everything that the rollout did: each of its model calls is in it.
        advantage: of the rollout, and so of all tokens that it sampled.
        shares: how much the loss of each token counts in the optimiser step; 0 for what was not sampled.
        sampler: log-probabilities of the sampled tokens, as their sampler says; nan for others, and where unknown.
        old: the same, as the trainer computed them before it learned from these rollouts; None: not yet.
        reference: the same of the model at the start; None: not yet.
    """

    row: Row
    advantage: float
    shares: list[float]
    sampler: list[float]
    old: Any = field(default=None)
    reference: Any = field(default=None)


def sampler_logprobs(graph: ThreadGraph, row: Row, *, tempered: bool = False) -> list[float]:
    """What the sampler said of each token of a flattened graph; nan where it said nothing.

    Args:
        graph: of the rollout.
        row: `flatten` of it.
        tempered: those of the law that tokens were drawn from, not of the model at temperature 1.
    """
    said: dict[int, list[float]] = {}
    for node in graph.nodes:
        values = said[node.id] = []
        for span in node.spans:
            told = span.tempered if tempered else span.logprobs
            values += told if span.origin == "sampled" and len(told) == span.count else [math.nan] * span.count
    return [
        math.nan if echo else said[node][index]
        for node, index, echo in zip(row.nodes, row.indices, row.echoes, strict=True)
    ]


def lesson(outcome: Outcome, *, tempered: bool = False) -> Lesson:
    """A rollout that nothing is known of yet but what happened.

    Raises:
        UsageError: its graph is no training row; see `flatten`.
    """
    row = flatten(outcome.graph)
    return Lesson(row, 0.0, [0.0] * len(row), sampler_logprobs(outcome.graph, row, tempered=tempered))


def split(whole: Lesson) -> list[Lesson]:
    """The same in rows that see nothing of each other, as APR's parents and children: each with a root of its own.

    In one row they would only wait for each other in attention. What a token counts was settled for the whole.
    """
    found = families(whole.row)
    if len(found) == 1:
        return [whole]
    made = []
    for entries in found:
        shares, sampler = ([values[i] for i in entries] for values in (whole.shares, whole.sampler))
        made.append(Lesson(select(whole.row, entries), whole.advantage, shares, sampler))
    return made


def even(sizes: Sequence[int], parts: int) -> list[range]:
    """Indices cut into parts of nearly equal sums, in order; some may be empty."""
    whole, done, edges = sum(sizes), 0, [0]
    for index, size in enumerate(sizes):
        while len(edges) < parts and done + size / 2 >= whole * len(edges) / parts:
            edges.append(index)
        done += size
    edges += [len(sizes)] * (parts + 1 - len(edges))
    return [range(a, b) for a, b in pairwise(edges)]


def batches(lessons: Sequence[Lesson], parts: int, skip: bool) -> list[list[Lesson]]:
    """The forwards of one optimiser step: rows of about one length together, and about as many tokens in each.

    Args:
        lessons: of the step.
        parts: how many.
        skip: those without an advantage teach nothing, and are left out.
    """
    chosen = [piece for each in lessons if each.advantage or not skip for piece in split(each)]
    chosen.sort(key=lambda each: len(each.row))
    return [[chosen[i] for i in part] for part in even([len(each.row) for each in chosen], parts)]
