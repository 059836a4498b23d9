"""What reinforcement learning brings on held-out Countdown: accuracy over SFT, and a shorter critical path.

    python benchmarks/countdown_rl.py gain --before MODEL --after MODEL          # after `orchestra train grpo`
    python benchmarks/countdown_rl.py acceleration [--limit 500]                  # makes its models itself

`gain` evaluates two models by `spawn_join` on the `hard` level, test split, greedily and at temperature 1, and compares
them problem by problem: McNemar's exact test, and the 95 % interval of the paired difference.

`acceleration` first teaches the embedded model to spawn its children at once or one by one, half of the time each,
after the same header (`adaptive_sft.py`). From there, two runs of the same number of steps, on the same prompts with
the same seeds: one is rewarded for correct answers, the other for correct answers and ThreadWeaver's acceleration.

Evaluations and trainings that were killed go on where they stopped. Writes `benchmarks/results/countdown_rl_*.md`.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestra.benchmarks.machine import machine
from orchestra.benchmarks.report import Column, Report
from orchestra.evaluation.statistics import mean, paired_difference
from orchestra.evaluation.store import SUMMARY, read_records
from orchestra.evaluation.summary import Summary, clusters_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    Column("model", "model"),
    Column("temperature", "temperature", ".0f"),
    Column("problems", "problems"),
    Column("accuracy", "solved, %", ".1f"),
    Column("stderr", "±", ".1f"),
    Column("calls", "calls", ".2f"),
    Column("alone", "without children, %", ".1f"),
    Column("sampled_tokens", "tokens", ",.0f"),
    Column("critical_path_tokens", "critical path", ",.1f"),
    Column("difference", "solved more than the first", "+.1f"),
    Column("low", "95 % from", "+.1f"),
    Column("high", "to", "+.1f"),
    Column("p", "p (McNemar)", ".1e"),
    Column("path", "critical path less", ",.1f"),
    Column("path_low", "95 % from ", ",.1f"),
    Column("path_high", "to ", ",.1f"),
)
NOTES = (
    "Countdown `hard`, test split, `spawn_join`, generations of at most 1,024 tokens. Solved ± standard error; columns "
    "on the right compare with the first model at the same temperature, problem by problem."
)


def mcnemar(one: dict[str, bool], other: dict[str, bool]) -> float:
    """The exact two-sided test that both solve as many: the binomial of those that only one of them solved."""
    gained = sum(other[item] and not right for item, right in one.items())
    lost = sum(right and not other[item] for item, right in one.items())
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def evaluated(model: str, temperature: float, limit: int, runs: Path) -> Path:
    """The folder of an evaluation, which goes on if it is there."""
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", model).strip("-") + f"-t{temperature:g}"
    command = [sys.executable, "-m", "orchestra", "eval", "countdown", "--level", "hard", "--split", "test"]
    command += ["--strategy", "spawn_join", "--engine", f"local:{model}?max_batch=384", "--limit", str(limit)]
    command += ["--temperature", str(temperature), "--max-tokens", "1024", "--concurrency", "96"]
    subprocess.run([*command, "--out", str(runs / name)], check=True)
    return runs / name


def row(label: str, folder: Path, temperature: float, first: Path | None) -> dict[str, Any]:
    """One line of a table."""
    summary = Summary.model_validate_json((folder / SUMMARY).read_bytes())
    records = list(read_records(folder))
    found: dict[str, Any] = {
        "model": label,
        "temperature": temperature,
        "problems": summary.items,
        "accuracy": 100 * (summary.accuracy or 0),
        "stderr": 100 * (summary.stderr or 0),
        "calls": summary.requests,
        "alone": 100 * mean([record.usage.requests == 1 for record in records]),
        "sampled_tokens": summary.sampled_tokens,
        "critical_path_tokens": summary.critical_path_tokens,
    }
    if first is not None:
        before = list(read_records(first))
        difference = paired_difference(clusters_of(before), clusters_of(records))
        paths = [{r.id: [r.usage.critical_path_tokens] for r in both} for both in (records, before)]
        shorter = paired_difference(*paths)
        right = [{r.id: bool(r.correct) for r in both} for both in (before, records)]
        found |= {
            "difference": 100 * difference.mean,
            "low": 100 * difference.low,
            "high": 100 * difference.high,
            "p": mcnemar(*right),
            "path": shorter.mean,
            "path_low": shorter.low,
            "path_high": shorter.high,
        }
    return found


def compare(
    title: str, models: dict[str, str], limit: int, runs: Path, file: str, notes: str, temperatures: Sequence[float]
) -> None:
    """Evaluate models at these temperatures and write the table; the first is what others are compared with."""
    report = Report(title, COLUMNS, machine(), f"{NOTES} {notes}".strip())
    for temperature in temperatures:
        first: Path | None = None
        for label, model in models.items():
            folder = evaluated(model, temperature, limit, runs)
            report.rows.append(row(label, folder, temperature, first))
            first = first or folder
            report.save(RESULTS / file)
    print(report.markdown())


def trained(model: Path, output: Path, steps: int, *overrides: str) -> Path:
    """The final model of a run, which goes on if it is there."""
    if (output / "final").is_dir():
        return output / "final"
    words = [f"model={model}", f"output={output}", f"steps={steps}", "save_every=2", *overrides]
    command = [sys.executable, "-m", "orchestra", "train", "grpo", str(ROOT / "configs/countdown-apr-grpo.yaml")]
    resume = ["--resume"] if list(output.glob("checkpoint-*/trainer_state.json")) else []
    subprocess.run([*command, *words, *resume], check=True)
    return output / "final"


def acceleration(steps: int, limit: int, runs: Path) -> None:
    """Both runs from one model, and their table."""
    start = runs / "adaptive"
    if not (start / "config.json").is_file():
        subprocess.run([sys.executable, str(ROOT / "benchmarks/adaptive_sft.py"), str(start)], check=True)
    # ThreadWeaver's loss: a mean over tokens. One over calls would favour many short ones, which is what is to go.
    same = ("prompts=8", "items=2000", "advantage=none", "mean=tokens")
    bonus = "rewards=[correctness, {reward: acceleration, rho: 0.5, clip: 0.2, weight: 3.0}]"
    plain = trained(start, runs / "correctness", steps, *same)
    fast = trained(start, runs / "acceleration", steps, *same, bonus)
    models = {"RL, correctness": str(plain), "RL, correctness + acceleration": str(fast), "before RL": str(start)}
    notes = f"Both runs took {steps} optimiser steps, two from each 64 rollouts; the bonus has weight 3."
    compare("The acceleration reward", models, limit, runs, "countdown_rl_acceleration.json", notes, [1.0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gain", "acceleration"])
    parser.add_argument("--before", default="runs/countdown-sft/final")
    parser.add_argument("--after", default="runs/countdown-apr-grpo/final")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "countdown_rl")
    parser.add_argument("--notes", default="")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.what == "gain":
        pair = {"SFT": options.before, "SFT and RL": options.after}
        compare("RL over SFT", pair, options.limit, options.runs, "countdown_rl_gain.json", options.notes, [1.0, 0.0])
    else:
        acceleration(options.steps, options.limit, options.runs)
