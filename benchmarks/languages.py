"""The embedded model's card: what it solves in each language that it speaks, on held-out Countdown.

    python benchmarks/languages.py [--limit 500] [--model FOLDER]

Runs `orchestra eval` for each line, greedily but for drafts (a killed run goes on where it stopped), then writes
`benchmarks/results/languages.md`. Under the table stands each behaviour's paired difference from serial search.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from orchestra.evaluation.statistics import paired_difference
from orchestra.evaluation.store import SUMMARY, read_records
from orchestra.evaluation.summary import Summary

RESULTS = Path(__file__).parent / "results" / "languages.md"
RUNS = Path("runs") / "languages"
LINES = {
    "sample": 1.0,
    "spawn_join": 1.0,
    "threads": 1.0,
    "map_reduce": 1.0,
    "async_think(workers=8)": 1.0,
    "refine(rounds=1)": 1.0,
    "pdr(widths=[4], distiller='random_k')": 0.4,
}
"""Each strategy, and the share of the problems that it is run on."""


def run(level: str, strategy: str, limit: int, model: str) -> Path:
    """Run or go on with one line; its run folder."""
    name = f"{level}-{strategy}".translate(str.maketrans("(=, )[]'", "--------")).replace("--", "-").strip("-")
    folder = RUNS / name
    command = [sys.executable, "-m", "orchestra", "eval", "countdown", "--level", level, "--split", "test"]
    command += ["--strategy", strategy, "--limit", str(limit), "--concurrency", "96", "--out", str(folder)]
    subprocess.run([*command, *(["--engine", f"local:{model}"] if model else [])], check=True)
    return folder


def solved(folder: Path) -> dict[str, list[float]]:
    """By problem, whether it was solved."""
    return {record.id: [float(bool(record.correct))] for record in read_records(folder)}


def row(summary: Summary) -> str:
    """One line of the table."""
    return (
        f"| {summary.parameters['level']} | `{summary.strategy}` | {summary.items} "
        f"| {100 * (summary.accuracy or 0):.1f} ± {100 * (summary.stderr or 0):.1f} "
        f"| {summary.sampled_tokens:,.0f} | {summary.critical_path_tokens:,.0f} "
        f"| {summary.critical_path_tokens_p95:,.0f} |"
    )


def main() -> None:
    """Run all lines, then write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--levels", default="hard")
    parser.add_argument("--model", default="", help="a folder; default: the embedded model")
    given = parser.parse_args()
    rows, notes = [], []
    for level in given.levels.split(","):
        folders = {s: run(level, s, max(1, int(given.limit * share)), given.model) for s, share in LINES.items()}
        rows += [row(Summary.model_validate_json((folder / SUMMARY).read_bytes())) for folder in folders.values()]
        serial = solved(folders["sample"])
        for strategy, folder in folders.items():
            if strategy != "sample":
                found = solved(folder)
                difference = paired_difference({item: serial[item] for item in found}, found)
                interval = f"95 % interval {100 * difference.low:.1f} to {100 * difference.high:.1f}"
                notes.append(f"- {level}, `{strategy}`: {100 * difference.mean:+.1f} points ({interval})")
    lines = [
        "| level | strategy | problems | solved, % | tokens | critical path | its 95th percentile |",
        "|---|---|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "Against serial search on the same problems:",
        "",
        *notes,
    ]
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
