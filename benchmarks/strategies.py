"""The README's table of strategies: the embedded model on held-out Countdown, under every strategy it can follow.

    make strategies-table          # about an hour on one core; killed, it goes on where it stopped

Runs `orchestra eval countdown --level hard --split test` for each line, 96 samples at a time, for accuracy and tokens
(which do not depend on what else runs), and once more on the first problems with nothing else on the engine, for the
seconds that one problem takes. Writes `benchmarks/results/strategies.md`, each run's manifest and summary beside it,
and the table in README.md. A strategy whose behaviour the model was never taught is marked so, not scored.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import fill

from orchestra.evaluation.store import MANIFEST, SUMMARY
from orchestra.evaluation.summary import Summary
from orchestra.strategies import registry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "strategies"
RUNS = ROOT / "runs" / "strategies"
MARKS = ("<!-- strategies: make strategies-table -->", "<!-- /strategies -->")

LINES = {
    "sample": 1.0,
    "sample(temperature=0.6)": 1.0,
    "beam_search(width=4)": 0.5,
    "first_finish(samples=8)": 1.0,
    "first_finish(samples=8, first=3)": 1.0,
    "first_finish(samples=8, last=3)": 1.0,
    "self_consistency(samples=8)": 0.5,
    "self_consistency(samples=8, until='unanimous', window=4)": 0.5,
    "self_consistency(samples=8, until='confident', window=2)": 0.5,
    "best_of(samples=8)": 0.5,
    "best_of(samples=8, hedged=True)": 0.5,
    "confidence_vote(samples=8, keep=0.5, window=64)": 0.5,
    "confidence_vote(samples=8, keep=0.9, window=64, warmup=4, batch=4)": 0.5,
    "cautious": 0.5,
    "power_smc(particles=8)": 0.5,
    "power_mh(blocks=4, moves=2, max_tokens=1500)": 0.25,
    "reward_smc(particles=8, target='power', alpha=4)": 0.25,
    "spawn_join": 1.0,
    "self_consistency(samples=4, drafts=spawn_join)": 0.5,
    "threads": 1.0,
    "map_reduce": 1.0,
    "async_think(workers=8)": 1.0,
    "refine(rounds=1)": 1.0,
    "pdr(widths=[4], distiller='random_k')": 0.5,
}
"""Each strategy, and the share of the problems that it is run on: long ones on fewer."""
UNTAUGHT = {
    "budget_forcing": "to think between tags",
    "hogwild": "to work together",
    "parallel_streams": "to compute in streams",
}
"""What the embedded model was not taught that a strategy builds on."""


def folder_of(strategy: str, limit: int, concurrency: int) -> Path:
    """Run or go on with one line; its run folder."""
    name = re.sub(r"[^a-z0-9_.]+", "-", strategy.lower()).strip("-") + ("" if concurrency > 1 else "-alone")
    folder = RUNS / name
    command = [sys.executable, "-m", "orchestra", "eval", "countdown", "--level", "hard", "--split", "test"]
    command += ["--strategy", strategy, "--limit", str(limit), "--concurrency", str(concurrency), "--out", str(folder)]
    subprocess.run(command, check=True)
    kept = RESULTS / name
    kept.mkdir(parents=True, exist_ok=True)
    for file in (MANIFEST, SUMMARY):
        shutil.copy(folder / file, kept / file)
    return folder


def summary(folder: Path) -> Summary:
    """Of a run folder."""
    return Summary.model_validate_json((folder / SUMMARY).read_bytes())


def row(strategy: str, all_at_once: Summary, alone: Summary) -> str:
    """One line of the table."""
    s = all_at_once
    return (
        f"| `{strategy}` | {s.items} | {100 * (s.accuracy or 0):.1f} ± {100 * (s.stderr or 0):.1f} "
        f"| {s.sampled_tokens:,.0f} | {s.critical_path_tokens:,.0f} | {alone.wall_seconds:.2f} |"
    )


def table_of(limit: int, timed: int) -> str:
    """Run every line and write the table."""
    together = {s: summary(folder_of(s, max(1, int(limit * share)), 96)) for s, share in LINES.items()}
    rows = [row(s, together[s], summary(folder_of(s, timed, 1))) for s in LINES]
    scored = {line.partition("(")[0] for line in LINES}
    if unknown := registry().keys() - scored - UNTAUGHT.keys():
        sys.exit(f"neither scored nor known as untaught: {', '.join(sorted(unknown))}")
    return "\n".join(
        [
            "| strategy | problems | solved, % | tokens | critical path | seconds |",
            "|---|---:|---:|---:|---:|---:|",
            *rows,
            *(f"| `{name}` | | not taught {what} | | | |" for name, what in UNTAUGHT.items()),
        ]
    )


def main() -> None:
    """Run all lines, then write the report and the README's table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=200, help="problems for accuracy and tokens")
    parser.add_argument("--timed", type=int, default=10, help="problems for the seconds of one")
    args = parser.parse_args()
    lines = table_of(args.limit, args.timed)
    notes = (
        "Countdown, `hard`, held-out problems, solved ± standard error; tokens sampled in all and along "
        f"the critical path, means; seconds of one problem with nothing else on the engine, mean of {args.timed}. "
        "Greedy where one sample is drawn, temperature 0.6 where several are."
    )
    machine = f"{platform.machine()}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', '-')}, Python "
    report = f"{lines}\n\n{notes} {machine}{platform.python_version()}.\n"
    RESULTS.with_suffix(".md").write_text(report, encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    before, start, rest = readme.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (start and end):
        sys.exit(f"README.md has no {MARKS[0]} ... {MARKS[1]}")
    written = f"{before}{start}\n{fill(notes, 119)}\n\n{lines}\n{end}{after}"
    (ROOT / "README.md").write_text(written, encoding="utf-8")
    print(lines)


if __name__ == "__main__":
    main()
