"""The README's first table: the embedded model's two ways of searching held-out Countdown (strategies.py has the rest).

    python benchmarks/modes.py [--limit 1000]

Runs `orchestra eval` for each line (a killed run goes on where it stopped), then writes `benchmarks/results/modes.md`
and each run's manifest and summary beside it. The claim under the table is the paired difference between spawn/join
and serial search of the same model on the same instances, within the critical path that spawn/join needs (its 95th
percentile): a sample with a longer critical path counts as wrong.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from orchestra.evaluation.statistics import paired_difference, percentile
from orchestra.evaluation.store import MANIFEST, SUMMARY, Record, read_records
from orchestra.evaluation.summary import Summary

RESULTS = Path(__file__).parent / "results" / "modes"
RUNS = Path("runs") / "modes"

LINES = [
    ("small", "sample", 1.0),
    ("small", "spawn_join", 0.3),
    ("small", "spawn_join(children=8)", 0.1),
    ("hard", "sample", 0.25),
    ("hard", "spawn_join", 0.25),
    ("hard", "sample(temperature=0.6)", 0.1),
]


def evaluate(level: str, strategy: str, limit: int) -> Path:
    """Run or go on with one line; its run folder."""
    name = f"{level}-{strategy}".translate(str.maketrans("(=, )", "-----")).replace("--", "-").strip("-")
    folder = RUNS / name
    command = [sys.executable, "-m", "orchestra", "eval", "countdown", "--level", level, "--split", "test"]
    subprocess.run(
        [*command, "--strategy", strategy, "--limit", str(limit), "--concurrency", "96", "--out", str(folder)],
        check=True,
    )
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in (MANIFEST, SUMMARY):
        shutil.copy(folder / file, kept / file)
    return folder


def row(summary: Summary) -> str:
    """One line of the table."""
    return (
        f"| {summary.parameters['level']} | `{summary.strategy}` | {summary.items} "
        f"| {100 * (summary.accuracy or 0):.1f} ± {100 * (summary.stderr or 0):.1f} "
        f"| {summary.sampled_tokens:,.0f} | {summary.critical_path_tokens:,.0f} "
        f"| {summary.critical_path_tokens_p95:,.0f} |"
    )


def within(records: list[Record], window: float) -> dict[str, list[float]]:
    """By item, whether it was solved within a critical path of `window` tokens."""
    return {r.id: [float(bool(r.correct) and r.usage.critical_path_tokens <= window)] for r in records}


def claim(level: str, serial: Path, parallel: Path) -> str:
    """Spawn/join against serial search within the critical path that spawn/join needs."""
    records = read_records(parallel)
    window = percentile((r.usage.critical_path_tokens for r in records), 0.95)
    ours, theirs = within(records, window), within(read_records(serial), window)
    difference = paired_difference(theirs, ours)
    both = ours.keys() & theirs.keys()
    share = [100 * sum(one[item][0] for item in both) / len(both) for one in (ours, theirs)]
    return (
        f"{level}: within {window:.0f} critical-path tokens (the 95th percentile of spawn/join), spawn/join solves "
        f"{share[0]:.1f} % and serial search {share[1]:.1f} % of {difference.items} instances: "
        f"{100 * difference.mean:.1f} points more (95 % interval {100 * difference.low:.1f} to "
        f"{100 * difference.high:.1f})."
    )


def main() -> None:
    """Run all lines, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=1000)
    limit = parser.parse_args().limit
    folders = {(level, spec): evaluate(level, spec, max(1, int(limit * share))) for level, spec, share in LINES}
    lines = [
        "| level | strategy | instances | solved, % | tokens | critical path | its 95th percentile |",
        "|---|---|---:|---:|---:|---:|---:|",
        *(row(Summary.model_validate_json((f / SUMMARY).read_bytes())) for f in folders.values()),
        "",
        *(claim(level, folders[level, "sample"], folders[level, "spawn_join"]) + "\n" for level in ("small", "hard")),
        f"Greedy where one sample is drawn, temperature 0.6 where several are. {platform.machine()}, Python "
        f"{platform.python_version()}; one command: `python benchmarks/modes.py`.",
    ]
    report = "\n".join(lines) + "\n"
    RESULTS.with_suffix(".md").write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
