"""What the strategy runner costs: rollouts beside the engine's raw generation of the same tokens.

    OMP_NUM_THREADS=1 python benchmarks/rollouts.py [--prompts 48] [--repeats 5]

Rollouts of `spawn_join` on Countdown `hard` with the embedded model, at temperature 1, all at once. Each graph is
then played again with nothing but `engine.generate`: a generation starts when those that it came after have ended, is
given the same forced tokens, and asked for as many tokens as it had (`max_tokens`, `ignore_eos`, no stop strings;
nothing looks at its text). Seed and fork path are the same, so the tokens are, too, which is checked. Both ways take
turns; the ratio is the median of the ratios of turns. Writes `benchmarks/results/rollouts.md` and `.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

import orchestra
from orchestra.benchmarks.machine import machine
from orchestra.benchmarks.report import Column, Report
from orchestra.evaluation import countdown
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.outcome import Outcome
from orchestra.runtime.engine import Delta, Engine, Request, Sampling

RESULTS = Path(__file__).parent / "results" / "rollouts.json"
STRATEGY = "spawn_join"
COLUMNS = (
    Column("way", "way"),
    Column("rollouts", "rollouts"),
    Column("generations", "generations"),
    Column("tokens", "sampled tokens", ",d"),
    Column("seconds", "seconds", ".2f"),
    Column("rate", "tokens/s", ",.0f"),
    Column("cpu", "CPU seconds", ".2f"),
    Column("ratio", "seconds to raw", ".3f"),
    Column("cpu_ratio", "CPU to raw", ".3f"),
)
NOTES = (
    "Countdown `hard`, train split, embedded model, temperature 1, all rollouts at once, in process, one thread. "
    "Medians of turns; ratios are medians of the ratios of turns, since other work on the machine meets both ways. "
    "CPU seconds are the process's own, all threads."
)


async def rolled(engine: Engine, prompts: list[str]) -> list[Outcome]:
    """Through the runner, as a trainer asks for it."""
    async with orchestra.connect(engine) as connection:
        runs = (
            connection.run(STRATEGY, prompt, seed=i, temperature=1.0, max_tokens=1024, logprobs=True)
            for i, prompt in enumerate(prompts)
        )
        return list(await asyncio.gather(*runs))


async def raw(engine: Engine, graphs: list[ThreadGraph]) -> list[ThreadGraph]:
    """The same generations, on the same schedule."""
    return list(await asyncio.gather(*(replay(engine, graph, seed) for seed, graph in enumerate(graphs))))


async def replay(engine: Engine, told: ThreadGraph, seed: int) -> ThreadGraph:
    """One graph again."""
    graph, made = ThreadGraph(), dict[int, Node]()
    ended = {node.id: asyncio.Event() for node in told.nodes}

    async def play(node: Node) -> None:
        for before in told.predecessors(node.id):
            await ended[before].wait()
        given = [Span(s.origin, s.tokens, s.count, s.text) for s in node.spans if s.origin != "sampled"]
        context = [Edge(made[parent].id, length) for parent, length in node.context]
        new = made[node.id] = graph.add(context, path=node.path, spans=given)
        if count := node.count("sampled"):
            sampling = Sampling(temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=True)
            whole = Delta()
            async for delta in engine.generate(Request(graph, new, sampling, seed, tuple(node.path))):
                whole.merge(delta)
            new.spans.append(Span("sampled", whole.tokens, whole.count, whole.text, whole.logprobs))
        new.finish_reason = node.finish_reason
        ended[node.id].set()

    async with asyncio.TaskGroup() as group:
        for node in told.nodes:
            group.create_task(play(node))
    await engine.release(graph)
    order = {node.id: place for place, node in made.items()}
    graph.nodes.sort(key=lambda node: order[node.id])
    return graph


async def main(prompts: int, repeats: int) -> Report:
    """Measure and tell."""
    report = Report("Rollouts through the strategy runner", COLUMNS, machine(), NOTES)
    texts = [one.prompt for one in countdown.generate("hard", "train", prompts)]
    async with orchestra.connect("demo?max_batch=384") as connection:
        engine = connection.engine
        graphs = [outcome.graph for outcome in await rolled(engine, texts)]  # and warm
        again = await raw(engine, graphs)
        tokens = [[node.tokens for node in graph.nodes] for graph in graphs]
        same = statistics.fmean(x == [node.tokens for node in y.nodes] for x, y in zip(tokens, again, strict=True))
        if same < 0.98:  # sums of another batch round otherwise: a draw in a million falls elsewhere
            raise SystemExit(f"only {same:.0%} of the graphs came out the same: this compares different work")
        walls: dict[str, list[float]] = {"raw": [], "runner": []}
        cpus: dict[str, list[float]] = {"raw": [], "runner": []}
        for turn in range(repeats):
            for way in ("raw", "runner") if turn % 2 else ("runner", "raw"):
                wall, cpu = time.perf_counter(), time.process_time()
                await (raw(engine, graphs) if way == "raw" else rolled(engine, texts))
                walls[way].append(time.perf_counter() - wall)
                cpus[way].append(time.process_time() - cpu)
    sampled = sum(graph.count("sampled") for graph in graphs)
    for way in ("raw", "runner"):
        seconds = statistics.median(walls[way])
        report.rows.append(
            {
                "way": {"raw": "engine.generate", "runner": STRATEGY}[way],
                "rollouts": prompts,
                "generations": sum(node.count("sampled") > 0 for graph in graphs for node in graph.nodes),
                "tokens": sampled,
                "seconds": seconds,
                "rate": sampled / seconds,
                "cpu": statistics.median(cpus[way]),
                "ratio": statistics.median(a / b for a, b in zip(walls[way], walls["raw"], strict=True)),
                "cpu_ratio": statistics.median(a / b for a, b in zip(cpus[way], cpus["raw"], strict=True)),
                "turns": [round(wall, 3) for wall in walls[way]],
                "cpu_turns": [round(cpu, 3) for cpu in cpus[way]],
                "same_graphs": same,
            }
        )
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    told = asyncio.run(main(options.prompts, options.repeats))
    told.save(RESULTS)
    print(told.markdown())
