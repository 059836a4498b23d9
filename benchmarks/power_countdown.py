"""Power sampling on Countdown at equal token budgets: the embedded model on held-out problems.

    python benchmarks/power_countdown.py          # about half an hour on one core; killed, it goes on where it stopped

Plain samples, the best of several by log-probability, and draws from p^alpha by Power-SMC and by Metropolis-Hastings.
Each line is one `orchestra eval countdown --level hard --split test`, many problems at a time, for accuracy and tokens,
and again with one problem at a time, for the seconds that one takes. Accuracies are compared in pairs with power_smc's.
Writes `benchmarks/results/power_countdown.md` and `.json`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from orchestra.benchmarks.machine import machine
from orchestra.benchmarks.report import Column, Report
from orchestra.evaluation.statistics import Difference, paired_difference
from orchestra.evaluation.store import SUMMARY, read_records
from orchestra.evaluation.summary import Summary, clusters_of

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "power_countdown.json"
RUNS = ROOT / "runs" / "power_countdown"
TOKENS = 1500  # of one text: 9 of 10 problems are through by then
THIS = "power_smc(particles=16)"
LINES = (
    "sample(temperature=1.0)",
    "sample(temperature=0.25)",
    "sample",
    THIS,
    "best_of(samples=16, scorer=logprob)",
    "power_mh(blocks=4, moves=3)",
)
COLUMNS = (
    Column("spec", "strategy"),
    Column("problems", "problems"),
    Column("accuracy", "solved, %", ".1f"),
    Column("stderr", "±", ".1f"),
    Column("difference", "more than power_smc", "+.1f"),
    Column("low", "95 % from", "+.1f"),
    Column("high", "to", "+.1f"),
    Column("sampled_tokens", "tokens", ",.0f"),
    Column("critical_path_tokens", "critical path", ",.0f"),
    Column("seconds", "seconds alone", ",.2f"),
)
NOTES = (
    f"Countdown `hard`, test split, texts of at most {TOKENS:,} tokens, alpha 4; solved ± standard error, differences "
    "paired by problem. `best_of` draws at temperature 1 and takes the likeliest text that has an answer. Seconds: one "
    "problem with nothing else on the engine, mean."
)


def run(strategy: str, limit: int, concurrency: int) -> Path:
    """Run or go on with one line; its run folder."""
    name = re.sub(r"[^a-z0-9_.]+", "-", strategy.lower()).strip("-") + ("" if concurrency > 1 else "-alone")
    command = [sys.executable, "-m", "orchestra", "eval", "countdown", "--level", "hard", "--split", "test"]
    command += ["--strategy", strategy, "--limit", str(limit), "--concurrency", str(concurrency)]
    command += ["--max-tokens", str(TOKENS), "--out", str(RUNS / name)]
    if strategy.startswith("best_of"):
        command += ["--temperature", "1.0"]
    subprocess.run(command, check=True)
    return RUNS / name


def together(strategy: str) -> int:
    """So many problems at a time that an engine's batch is full."""
    return 8 if "16" in strategy else 96


def row(strategy: str, limit: int, timed: int, reference: Path) -> dict[str, Any]:
    """One line of the table."""
    folder = run(strategy, limit, together(strategy))
    alone = Summary.model_validate_json((run(strategy, timed, 1) / SUMMARY).read_bytes())
    whole = Summary.model_validate_json((folder / SUMMARY).read_bytes())
    difference: Difference | None = None
    if folder != reference:
        difference = paired_difference(clusters_of(read_records(reference)), clusters_of(read_records(folder)))
    return {
        "spec": strategy,
        "problems": whole.items,
        "accuracy": 100 * (whole.accuracy or 0),
        "stderr": 100 * (whole.stderr or 0),
        "difference": difference and 100 * difference.mean,
        "low": difference and 100 * difference.low,
        "high": difference and 100 * difference.high,
        "sampled_tokens": whole.sampled_tokens,
        "critical_path_tokens": whole.critical_path_tokens,
        "seconds": alone.wall_seconds,
    }


def main() -> None:
    """Run all lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=120, help="problems for accuracy and tokens")
    parser.add_argument("--timed", type=int, default=3, help="problems for the seconds of one")
    args = parser.parse_args()
    report = Report("Power sampling at equal token budgets", COLUMNS, machine(), NOTES)
    reference = run(THIS, args.limit, together(THIS))
    for strategy in LINES:
        report.rows.append(row(strategy, args.limit, args.timed, reference))
        report.save(RESULTS)
    print(report.markdown())


if __name__ == "__main__":
    main()
