"""What the samples of a run say: the content of `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import BaseModel, Field

from orchestra.evaluation.statistics import (
    Clusters,
    clustered_mean,
    majority_correct,
    mean,
    mean_pass_at_k,
    percentile,
)
from orchestra.evaluation.store import Plan, Record


class Summary(BaseModel):
    """A run in numbers. None where there is nothing to tell it from.

    Attributes:
        task, strategy, items, repeats: what was run.
        parameters, engine, seed, budget: likewise.
        accuracy: share of correct ones among the graded samples.
        stderr: its standard error, clustered by item.
        maj_at_k: accuracy of a majority vote over the samples of each item; by k, the number of samples.
        pass_at_k: chance that one of k samples is correct, unbiased; by k.
        sampled_tokens, critical_path_tokens, sequential_tokens, total_tokens, requests, wall_seconds: means over the
            samples that did not fail; see `Usage`.
        critical_path_tokens_p95: 95th percentile.
        accuracy_within: accuracy when samples with a longer critical path count as wrong; by tokens.
        accuracy_within_sequential: the same by `sequential_tokens`: accuracy at matched B_seq.
        ungraded: samples without a grade; they count neither way.
        failed: samples that ended with an error; likewise.
        stopped: samples that a budget ended early; by budget.
    """

    task: str
    strategy: str
    items: int
    repeats: int
    accuracy: float | None
    stderr: float | None
    maj_at_k: dict[int, float]
    pass_at_k: dict[int, float]
    sampled_tokens: float | None
    critical_path_tokens: float | None
    critical_path_tokens_p95: float | None
    sequential_tokens: float | None = None
    total_tokens: float | None = None
    requests: float | None = None
    wall_seconds: float | None
    ungraded: int
    failed: int
    accuracy_within: dict[int, float] = Field(default_factory=dict)
    accuracy_within_sequential: dict[int, float] = Field(default_factory=dict)
    stopped: dict[str, int] = Field(default_factory=dict)
    parameters: dict[str, object] = Field(default_factory=dict)
    engine: str = ""
    seed: int = 0
    budget: str | None = None


def clusters_of(records: Iterable[Record]) -> dict[str, list[float]]:
    """The grades of each item's samples, 1.0 for correct; what has no grade is left out."""
    clusters: dict[str, list[float]] = {}
    for record in sorted(records, key=lambda r: r.key):
        if record.correct is not None and not record.failed:
            clusters.setdefault(record.id, []).append(float(record.correct))
    return clusters


def summarise(plan: Plan, records: Iterable[Record]) -> Summary:
    """The numbers of a run. They do not depend on the order of the records."""
    records = sorted(records, key=lambda r: r.key)
    done = [r for r in records if not r.failed]
    graded = [r for r in done if r.correct is not None]
    clusters = clusters_of(graded)
    accuracy = clustered_mean(clusters)
    stopped: dict[str, int] = {}
    for record in done:
        if record.stopped_by:
            stopped[record.stopped_by] = stopped.get(record.stopped_by, 0) + 1
    return Summary(
        task=plan.task,
        strategy=plan.strategy,
        items=len({r.id for r in records}),
        repeats=plan.repeats,
        accuracy=_known(accuracy.mean),
        stderr=_known(accuracy.stderr),
        maj_at_k=_majority(graded, plan.repeats),
        pass_at_k=_pass(clusters, plan.repeats),
        sampled_tokens=_known(mean(r.usage.sampled_tokens for r in done)),
        critical_path_tokens=_known(mean(r.usage.critical_path_tokens for r in done)),
        critical_path_tokens_p95=_known(percentile((r.usage.critical_path_tokens for r in done), 0.95)),
        sequential_tokens=_known(mean(r.usage.sequential_tokens for r in done)),
        total_tokens=_known(mean(r.usage.total_tokens for r in done)),
        requests=_known(mean(r.usage.requests for r in done)),
        wall_seconds=_known(mean(r.usage.wall_seconds for r in done)),
        ungraded=len(done) - len(graded),
        failed=len(records) - len(done),
        accuracy_within=_within([(r, r.usage.critical_path_tokens) for r in graded]),
        accuracy_within_sequential=_within([(r, r.usage.sequential_tokens) for r in graded]),
        stopped=stopped,
        parameters=plan.parameters,
        engine=plan.engine,
        seed=plan.seed,
        budget=plan.budget,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _majority(graded: list[Record], repeats: int) -> dict[int, float]:
    votes: dict[str, list[tuple[str | None, float]]] = {}
    for record in graded:
        votes.setdefault(record.id, []).append((record.answer, float(bool(record.correct))))
    full = [v for v in votes.values() if len(v) == repeats]
    return {repeats: mean(map(majority_correct, full))} if full else {}


def _pass(clusters: Clusters, repeats: int) -> dict[int, float]:
    """pass@k at powers of two up to, and at, the number of repeats."""
    ks = {repeats} | {2**i for i in range(repeats.bit_length()) if 2**i <= repeats}
    values = {k: mean_pass_at_k(clusters, k) for k in sorted(ks)}
    return {k: value for k, value in values.items() if not math.isnan(value)}


def _within(graded: list[tuple[Record, int]]) -> dict[int, float]:
    """Accuracy within windows of 64, 96, 128, 192, ... tokens of what each sample cost, as far as the samples reach."""
    longest = max((cost for _, cost in graded), default=0)
    windows: dict[int, float] = {}
    window = 64
    while graded:
        for size in (window, window * 3 // 2):
            windows[size] = mean(bool(record.correct) and cost <= size for record, cost in graded)
            if size >= longest:
                return windows
        window *= 2
    return windows
