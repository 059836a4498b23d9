"""Recycles the embedded model with four streams, and as it is, on the same extra tokens: who predicts better?

    OMP_NUM_THREADS=1 python benchmarks/parscale_recycle.py   # half an hour on one core; goes on where it stopped

The extra tokens are Countdown on numbers up to 75, which the model has not seen (it knows them up to 50). Both arms see
the same batches in the same order, at the learning rate that suits the plain model best: of three, on a seed of its
own. Then three seeds, which change batches and fresh parameters. The held-out problems are the same for all runs.
`--arm NAME --seed N` makes one run alone, so that several can go on side by side; the table is written without it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from orchestra.benchmarks.machine import machine
from orchestra.benchmarks.report import Column, Report
from orchestra.evaluation.countdown import LEVELS, Level
from orchestra.parscale.model import ParScale
from orchestra.runtime.local.sources import load_tokenizer
from orchestra.training.config import ParScaleConfig
from orchestra.training.parscale import row_losses, train_parscale
from orchestra.training.parscale_data import load_data

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "orchestra" / "assets" / "embedded"
LEVELS["large"] = Level("large", largest=75, above=50, openings=(1, 6))
"""Only here: the evaluation knows the levels that the embedded model was made for."""

COMMON = ParScaleConfig(
    backbone=str(EMBEDDED),
    levels={"large": 1.0},
    prefix_tokens=16,
    key_std=1.0,
    stream_learning_rate=5e-3,
    held_out=500,
    steps=600,
    batch_tokens=2000,
    longest=700,
    validate_every=200,
)
ARMS = {"P=1": 1, "P=4": 4}
RATES = (5e-4, 1e-3, 2e-3)
TUNING_SEED, TUNING_STEPS = 100, 100
SEEDS = (1, 2, 3)


def run(folder: Path, config: ParScaleConfig) -> list[list[float]]:
    """Train, unless that is done, and give the held-out rows' summed losses and weights."""
    kept = folder / "rows.json"
    if not kept.exists():
        config = replace(config, output=str(folder))
        final = train_parscale(config, resume=any(folder.glob("checkpoint-*")))
        held_out = load_data(config, load_tokenizer(str(EMBEDDED))).held_out
        kept.write_text(json.dumps(row_losses(ParScale.from_pretrained(final), held_out).tolist()))
    found: list[list[float]] = json.loads(kept.read_text())
    return found


def mean(rows: list[list[float]]) -> float:
    return sum(row[0] for row in rows) / sum(row[1] for row in rows)


def row_error(rows: list[list[float]], others: list[list[float]]) -> float:
    """Standard error over rows of the difference of two mean losses of the same rows (all weights are equal)."""
    weight, difference = sum(row[1] for row in rows), mean(rows) - mean(others)
    scatter = [row[0] - other[0] - difference * row[1] for row, other in zip(rows, others, strict=True)]
    return math.sqrt(sum(value * value for value in scatter)) / weight


def tune(runs: Path, arm: str, rates: Sequence[float] = RATES) -> dict[float, float]:
    """The loss after a short run at each learning rate."""
    config = replace(COMMON, streams=ARMS[arm], seed=TUNING_SEED, steps=TUNING_STEPS, validate_every=0)
    return {rate: mean(run(runs / arm / f"rate-{rate:g}", replace(config, learning_rate=rate))) for rate in rates}


def train(runs: Path, arm: str, seed: int) -> list[list[float]]:
    """One run, at the control's best learning rate."""
    tried = tune(runs, "P=1")
    rate = min(tried, key=tried.__getitem__)
    config = replace(COMMON, streams=ARMS[arm], learning_rate=rate, seed=seed)
    return run(runs / arm / f"seed-{seed}", config)


def report(runs: Path) -> Report:
    """A row for each seed, and one for their mean."""
    held_out = load_data(COMMON, load_tokenizer(str(EMBEDDED))).held_out
    before = mean(row_losses(ParScale.recycle(EMBEDDED, 1), held_out).tolist())
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        one, four = train(runs, "P=1", seed), train(runs, "P=4", seed)
        curves = {arm: curve(runs / arm / f"seed-{seed}") for arm in ARMS}
        difference = {"difference": mean(four) - mean(one), "error": row_error(four, one)}
        rows.append({"seed": str(seed), "one": mean(one), "four": mean(four), **difference, "curves": curves})
    means = {key: statistics.mean(row[key] for row in rows) for key in ("one", "four", "difference")}
    error = statistics.stdev(row["difference"] for row in rows) / math.sqrt(len(SEEDS))
    rows.append({"seed": "mean", **means, "error": error})
    tried = tune(runs, "P=1")
    losses = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in tried.items())
    notes = (
        f"Mean weighted cross-entropy (nats) on {sum(map(len, held_out))} held-out rows of Countdown with numbers up "
        f"to 75, {before:.4f} before; after {COMMON.steps} steps of {COMMON.batch_tokens} tokens, all weights trained. "
        f"The difference is P=4 less P=1; its standard error is over the rows of a seed, and in the last line over the "
        f"seeds. Prefixes of {COMMON.prefix_tokens} tokens, keys of standard deviation {COMMON.key_std:g} at first, "
        f"smoothing {COMMON.smoothing}, learning rate {COMMON.stream_learning_rate:g} for the streams and else "
        f"{min(tried, key=tried.__getitem__):g} for both: the best for P=1 after {TUNING_STEPS} steps on another seed "
        f"({losses})."
    )
    columns = (
        Column("seed", "seed"),
        Column("one", "P=1", ".5f"),
        Column("four", "P=4", ".5f"),
        Column("difference", "difference", "+.5f"),
        Column("error", "±", ".5f"),
    )
    return Report("Recycling the embedded model: loss on held-out problems", columns, machine(), notes, rows)


def curve(folder: Path) -> dict[int, float]:
    """Validation loss by step; the last word on a step counts, as after a resumption."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=Path, default=ROOT / "runs" / "parscale_recycle", help="folder of the runs")
    options.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "parscale_recycle.json")
    options.add_argument("--arm", choices=ARMS, help="make one run alone, and no table")
    options.add_argument("--seed", type=int, choices=SEEDS, default=SEEDS[0], help="of that run")
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.arm:
        train(given.runs, given.arm, given.seed)
        return
    made = report(given.runs)
    made.save(given.out)
    print(made.markdown())


if __name__ == "__main__":
    main()
