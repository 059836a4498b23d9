"""Recycles the embedded model with four streams, and as it is, on the same extra tokens: who predicts better?

    OMP_NUM_THREADS=1 python benchmarks/parscale_recycle.py      # about two hours on one core; goes on where it stopped

The extra tokens are Countdown on numbers up to 75, which the model has not seen (it knows them up to 50). All arms see
the same batches in the same order. Each arm's learning rate is the best of its own few on a seed of its own; then three
seeds, which change batches and fresh parameters. Loss is held against the same held-out problems for every run.
`--arm NAME` trains one arm alone, so that several can run side by side; the table is written when all are there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
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
    held_out=500,
    steps=150,
    batch_tokens=2000,
    longest=700,
    validate_every=75,
)
ARMS: dict[str, dict[str, Any]] = {
    "P=1, whole model": {"streams": 1, "train": "all"},
    "P=4, whole model": {"streams": 4, "train": "all"},
    "P=4, streams alone": {"streams": 4, "train": "streams"},
}
RATES = {
    "P=1, whole model": (1e-3, 2e-3, 4e-3),
    "P=4, whole model": (1e-3, 2e-3, 4e-3),
    "P=4, streams alone": (4e-3, 1.2e-2),
}
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


def tuned(runs: Path, arm: str) -> tuple[float, dict[float, float]]:
    """The arm's best learning rate, and the loss at each of its own."""
    config = replace(COMMON, **ARMS[arm], seed=TUNING_SEED, steps=TUNING_STEPS, validate_every=0)
    losses = {
        rate: mean(run(runs / name(arm) / f"rate-{rate:g}", replace(config, learning_rate=rate))) for rate in RATES[arm]
    }
    return min(losses, key=losses.__getitem__), losses


def train(runs: Path, arm: str) -> dict[int, list[list[float]]]:
    """All runs of an arm."""
    config = replace(COMMON, **ARMS[arm], learning_rate=tuned(runs, arm)[0])
    return {seed: run(runs / name(arm) / f"seed-{seed}", replace(config, seed=seed)) for seed in SEEDS}


def name(arm: str) -> str:
    return arm.replace("=", "").replace(",", "").replace(" ", "-")


def report(runs: Path) -> Report:
    """The table of all arms, each beside the first."""
    config = replace(COMMON, output=str(runs / "before"))
    before = row_losses(ParScale.recycle(EMBEDDED, 1), load_data(config, load_tokenizer(str(EMBEDDED))).held_out)
    arms = {arm: train(runs, arm) for arm in ARMS}
    control = next(iter(arms.values()))
    rows = []
    for arm, found in arms.items():
        losses = {seed: mean(found[seed]) for seed in SEEDS}
        gains = [losses[seed] - mean(control[seed]) for seed in SEEDS]
        rate, tried = tuned(runs, arm)
        same = found is control
        rows.append(
            {"arm": arm, "rate": rate, "loss": statistics.mean(losses.values()), "losses": losses, "tried": tried}
            | {"error": statistics.stdev(losses.values()) / math.sqrt(len(SEEDS))}
            | {"gain": None if same else statistics.mean(gains)}
            | {"gain_error": None if same else statistics.stdev(gains) / math.sqrt(len(SEEDS))}
            | {"gains": gains, "row_errors": [row_error(found[seed], control[seed]) for seed in SEEDS]}
            | {"curves": {seed: curve(runs / name(arm) / f"seed-{seed}") for seed in SEEDS}}
        )
    notes = (
        f"Loss: mean weighted cross-entropy (nats) of {len(before)} held-out rows of Countdown on numbers up to 75, "
        f"{mean(before.tolist()):.4f} before; after {COMMON.steps} steps of {COMMON.batch_tokens} tokens. "
        f"Means of {len(SEEDS)} seeds with the standard error over seeds; differences are paired by seed. "
        f"Prefixes of {COMMON.prefix_tokens} tokens, smoothing {COMMON.smoothing}. Learning rates were chosen by the "
        f"loss after {TUNING_STEPS} steps on another seed."
    )
    columns = (
        Column("arm", "arm"),
        Column("rate", "learning rate", "g"),
        Column("loss", "loss", ".4f"),
        Column("error", "± seeds", ".4f"),
        Column("gain", "difference to P=1", "+.4f"),
        Column("gain_error", "± seeds", ".4f"),
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
    options.add_argument("--arm", choices=ARMS, help="train this arm alone, and write no table")
    given = options.parse_args()
    torch.set_num_threads(1)
    if given.arm:
        train(given.runs, given.arm)
        return
    made = report(given.runs)
    made.save(given.out)
    print(made.markdown())


if __name__ == "__main__":
    main()
