"""Training on merged units against training on each unit alone: speed for the tokens that are saved.

``python benchmarks/merging.py [--layers 4] [--rounds 5]``: a Llama of Qwen2.5-0.5B's width takes forward and backward
passes over ThreadWeaver trajectories (prompt, outlines, threads, what follows). Merged: one row, shared tokens once, a
dense mask. Alone: every request of the trajectory as a causal sequence without a mask, one after the other or padded to
one batch, whichever is faster. The share of collation is that of making rows into a batch.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from orchestra.training import GraphCollator, Row, Unit, merge, weighted_loss

RESULTS = Path(__file__).parent / "results" / "merging.md"


def trajectory(rng: random.Random, threads: int, each: int, prompt: int, rest: int) -> list[Unit]:
    """The requests of one block: the whole text, the plan, each thread, and what follows."""

    def words(count: int) -> list[int]:
        return [rng.randrange(10, 1000) for _ in range(count)]

    given, plan, after = words(prompt), words(20 * threads), words(rest)
    base = [*given, *plan, 5]
    bodies = [[6, 20 + i, *words(each)] for i in range(threads)]
    joined = [*base, *(token for body in bodies for token in body), 7]
    whole = Unit(given, [*joined, *after][len(given) :])
    return [
        whole,
        Unit(given, plan),
        *(Unit([*base, *body[:2]], body[2:]) for body in bodies),
        Unit(joined, after),
    ]


def alone(unit: Unit) -> Row:
    """A unit as a sequence of its own."""
    return Row.sequence(
        [*unit.context, *unit.completion], [0.0] * len(unit.context) + [unit.weight] * len(unit.completion)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=8192,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=options.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    model = transformers.Qwen2ForCausalLM(config)
    collator = GraphCollator(0, config=config)

    def step(rows: list[Row]) -> float:
        """Forward and backward of one batch; seconds of collation."""
        began = time.perf_counter()
        batch = collator(rows)
        collated = time.perf_counter() - began
        labels, weights = batch.pop("labels"), batch.pop("loss_weights")
        weighted_loss(model(**batch, use_cache=False).logits, labels, weights, 1000.0).backward()
        return collated

    def timed(work: Callable[[], float]) -> tuple[float, float]:
        model.zero_grad()
        began = time.perf_counter()
        collated = work()
        return time.perf_counter() - began, collated

    lines = []
    for name, shape in {
        "4 threads of 100": (4, 100, 120, 80),
        "6 threads of 70": (6, 70, 60, 40),
        "3 threads of 60": (3, 60, 60, 40),
        "8 threads of 60": (8, 60, 40, 40),
    }.items():
        units = trajectory(random.Random(name), *shape)
        rows, merged = [alone(unit) for unit in units], merge(units)
        saving = sum(map(len, rows)) / len(merged)

        def each(rows: list[Row] = rows) -> float:
            return sum(step([row]) for row in rows)

        def together(rows: list[Row] = rows) -> float:
            return step(rows)

        def one(merged: Row = merged) -> float:
            return step([merged])

        ways = {"each": each, "together": together, "merged": one}
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(options.rounds + 1):
            for way, work in ways.items():
                taken = timed(work)
                if number:  # the first round warms up
                    times[way].append(taken)
        median = {way: statistics.median(seconds for seconds, _ in taken) for way, taken in times.items()}
        speed = min(median["each"], median["together"]) / median["merged"]
        collation = statistics.median(collated / seconds for seconds, collated in times["merged"])
        lines.append(
            f"| {name} | {len(merged)} | {saving:.2f} | {median['each']:.2f} | {median['together']:.2f} | "
            f"{median['merged']:.2f} | {speed:.2f} | **{speed / saving:.2f}** | {100 * collation:.1f} |"
        )
        print(lines[-1], flush=True)
    text = f"""# Merged units against units alone

`python benchmarks/merging.py --layers {options.layers} --rounds {options.rounds}`: forward and backward, float32, width
of Qwen2.5-0.5B, {options.layers} layers. Medians of {options.rounds} alternating rounds; {torch.get_num_threads()}
thread(s), {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}.

| trajectory | merged | saved, x | each alone, s | padded, s | merged, s | faster, x | of what is saved | collation, % |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
"""
    text += "\n".join(lines) + "\n"
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
