"""Adaptive parallel reasoning against serial search (SoS+) on the paper's task: both arms on equal tokens, one GPU.

    python benchmarks/apr_gpu.py [--tokens 300000000] [--problems 1000] [--smoke]

Makes each arm's demonstrations, trains each with configs/apr-20m-gpu.yaml, solves the same held-out problems greedily
with both and writes `benchmarks/results/apr_gpu.md`: the paired interval of APR minus SoS+, accuracy within context
windows (a sample counts if its longest sequence fits) and by the number of children, beside the paper's figures.

Only `--smoke` has been run (a minute on a CPU; its figures mean nothing and are not written). On one H200 the defaults
are meant to take about 25 minutes of the GPU; the demonstrations take as long on 16 cores before that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import datasets
import yaml

import orchestra
from orchestra.evaluation.statistics import paired_difference
from orchestra.protocols.apr_published import solution
from orchestra.training.apr_search import Problem, check_solution, parent_prompt, problems, serial_prompt
from orchestra.training.made import Wanted, make

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "apr_gpu.md"
ARMS = {"sos": "sample", "apr": "spawn_join(language='published')"}
PAPER = {"sos": (57.3, 60.0), "apr": (75.5, 83.4)}
"""Greedy accuracy of the paper's models after supervised training, and after reinforcement learning."""
WINDOWS = (1024, 1536, 2048, 3072, 4096)
SHARD = 20_000


@dataclass(frozen=True)
class Sample:
    """What became of a problem: `longest` is the longest sequence of any call, `children` how many there were."""

    solved: bool
    tokens: int
    critical_path: int
    longest: int
    children: int


def _shard(arm: str, seed: int, rows: int, folder: Path) -> int:
    if not folder.exists():
        made = folder.with_name(f"{folder.name}-making")
        shutil.rmtree(made, ignore_errors=True)
        make(Wanted("apr", rows, seed, (arm,)), made)
        made.rename(folder)
    return sum(map(len, datasets.load_from_disk(str(folder))["input_ids"]))


def demonstrations(arm: str, tokens: int, rows: int, folder: Path) -> list[Path]:
    """Shards of an arm with at least so many tokens; those that are there already are kept."""
    chosen: list[Path] = []
    total, seed, workers = 0, 0, os.cpu_count() or 1
    with ProcessPoolExecutor(workers) as pool:
        while total < tokens:
            shards = [(arm, seed + i, rows, folder / f"{arm}-{seed + i}") for i in range(workers)]
            for shard, count in zip(shards, pool.map(_shard, *zip(*shards, strict=True)), strict=True):
                if total < tokens:
                    chosen.append(shard[3])
                    total += count
            seed += workers
    print(f"{arm}: {total:,} tokens in {len(chosen)} shards", flush=True)
    return chosen


def train(arm: str, shards: list[Path], config: str, folder: Path) -> Path:
    """Train an arm; its model folder."""
    output = folder / f"model-{arm}"
    if not (output / "final").exists():
        sources = yaml.safe_dump([{"path": str(shard)} for shard in shards], default_flow_style=True, width=1 << 30)
        words = [f"output={output}", f"tokenizer={shards[0] / 'tokenizer'}", f"data={sources.strip()}"]
        command = [sys.executable, "-m", "orchestra", "train", "sft", str(ROOT / "configs" / config), *words]
        subprocess.run(command, check=True)
    return output / "final"


async def solve(model: Path, arm: str, held_out: list[Problem], device: str, max_tokens: int) -> list[Sample]:
    """Solve problems greedily, as served."""
    prompts = [parent_prompt(one) if arm == "apr" else serial_prompt(one) for one in held_out]
    slots = asyncio.Semaphore(64)

    async with orchestra.connect(f"local:{model}?device={device}") as engine:

        async def one(prompt: str) -> Sample:
            async with slots:
                outcome = await engine.run(ARMS[arm], prompt, temperature=0, max_tokens=max_tokens)
            nodes, usage = outcome.graph.nodes, outcome.usage
            solved = check_solution(prompt, solution(outcome.text) or "")
            children = sum(not node.context for node in nodes) - 1
            longest = max(node.end for node in nodes)
            return Sample(solved, usage.sampled_tokens, usage.critical_path_tokens, longest, children)

        return list(await asyncio.gather(*map(one, prompts)))


def report(samples: dict[str, list[Sample]], tokens: int) -> str:
    """The page."""
    lines = [
        f"# APR against SoS+ on equal tokens ({tokens:,} an arm), {len(samples['apr'])} held-out problems, greedy",
        "",
        "| arm | solved, % | paper: supervised, reinforced | tokens | critical path | children |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for arm, found in samples.items():
        count, (before, after) = len(found), PAPER[arm]
        means = [sum(getattr(one, name) for one in found) / count for name in ("tokens", "critical_path", "children")]
        solved = sum(one.solved for one in found) / count
        error = (solved * (1 - solved) / count) ** 0.5
        shown = " | ".join(f"{mean:,.0f}" for mean in means[:2])
        rate = f"{100 * solved:.1f} ± {100 * error:.1f}"
        lines.append(f"| {arm} | {rate} | {before}, {after} | {shown} | {means[2]:.1f} |")
    by_item = {arm: {str(i): [float(one.solved)] for i, one in enumerate(found)} for arm, found in samples.items()}
    difference = paired_difference(by_item["sos"], by_item["apr"])
    low, high = 100 * difference.low, 100 * difference.high
    lines += [
        "",
        f"APR minus SoS+: {100 * difference.mean:.1f} points (95 % interval {low:.1f} to {high:.1f}).",
        "",
        "| window, tokens | SoS+, % | APR, % |",
        "|---:|---:|---:|",
    ]
    for window in WINDOWS:
        within = [sum(one.solved and one.longest <= window for one in found) / len(found) for found in samples.values()]
        lines.append(f"| {window:,} | " + " | ".join(f"{100 * share:.1f}" for share in within) + " |")
    lines += ["", "| children | problems | solved by APR, % |", "|---:|---:|---:|"]
    for least, most in ((0, 0), (1, 2), (3, 5), (6, 8), (9, 12), (13, 1000)):
        found = [one for one in samples["apr"] if least <= one.children <= most]
        if found:
            name = str(least) if least == most else f"{least}-{most}" if most < 1000 else f"{least} or more"
            lines.append(f"| {name} | {len(found)} | {100 * sum(one.solved for one in found) / len(found):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make, train, evaluate, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=300_000_000)
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "apr-gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    config, rows, longest = "apr-20m-gpu.yaml", SHARD, 4096
    if given.smoke:
        given.tokens, given.problems, given.device = 2_000, 3, "cpu"
        given.folder = given.folder.with_name("apr-gpu-smoke")
        config, rows, longest = "apr-20m-gpu-smoke.yaml", 12, 24
    held_out = list(islice(problems(random.Random("apr/held out")), given.problems))
    samples = {}
    for arm in ARMS:
        shards = demonstrations(arm, given.tokens, rows, given.folder)
        model = train(arm, shards, config, given.folder)
        samples[arm] = asyncio.run(solve(model, arm, held_out, given.device, longest))
    page = report(samples, given.tokens)
    print(page)
    if not given.smoke:
        RESULTS.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
