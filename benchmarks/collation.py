"""What a step of supervised training spends on making its batch: reading rows, taking them apart, packing, masks.

    python benchmarks/collation.py [--rounds 8]

Rows are those of `spawn_join` on Countdown (a parent and its children), read from a data set on disk. Two models: the
one on board, of under a million parameters, whose steps are as short as steps can be, and a Llama of 30 million.
Batches are made as the trainer makes them; forward, backward and an AdamW step follow. Writes results/collation.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from orchestra.benchmarks.machine import machine
from orchestra.benchmarks.report import Column, Report
from orchestra.evaluation.countdown import stream
from orchestra.graph import Span
from orchestra.runtime.engine import Prompt
from orchestra.training import demonstrations, sft, tokenizer
from orchestra.training.batches import RowBatches, Rows
from orchestra.training.collate import GraphCollator
from orchestra.training.flatten import Row, flatten
from orchestra.training.graphs import graph_of
from orchestra.training.trainer import WeightedSFTTrainer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "collation.json"
COLUMNS = (
    Column("model", "model"),
    Column("rows", "rows"),
    Column("tokens", "tokens a step", ",.0f"),
    Column("collation", "batch, ms", ".1f"),
    Column("step", "step, ms", ",.0f"),
    Column("share", "share, %", ".2f"),
)


class Words:
    """The embedded model's words."""

    def prompt(self, prompt: Prompt, **_: Any) -> Span:
        ids = [tokenizer.BOS, *tokenizer.encode(str(prompt))]
        return Span("prompt", ids, len(ids), str(prompt))

    def forced(self, text: str) -> Span:
        ids = tokenizer.encode(text)
        return Span("forced", ids, len(ids), text)


def spawned(count: int) -> list[Row]:
    """Rows of parents with their children."""
    rng, rows = random.Random(0), []
    instances = stream("hard", "train", rng)
    while len(rows) < count:
        parent, children = demonstrations.spawn_join(next(instances), rng)
        prompt, header, rest = parent.text.partition("\n")
        texts = ["\n" + child.text.partition("\n")[2] for child in children]
        rows.append(flatten(graph_of(prompt, header + rest, "apr", Words(), tokenizer.EOS, branches=texts)))
    return rows


def models() -> dict[str, Any]:
    large = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return {
        "on board": transformers.AutoModelForCausalLM.from_pretrained(ROOT / "orchestra" / "assets" / "embedded"),
        "30 million": transformers.LlamaForCausalLM(large),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    report = Report("Making batches, as a share of a training step", COLUMNS, machine(torch.device("cpu")))
    report.notes = (
        f"Medians of {rounds} steps of 4 rows; batches are read from disk and packed without help of workers."
    )
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list([row.columns() for row in spawned(4 * rounds + 4)]).save_to_disk(f"{folder}/rows")
        source = RowBatches([Rows(datasets.load_from_disk(f"{folder}/rows"))], 4, seed=0)
        for name, model in models().items():
            for pack in (None, 512):
                trainer = WeightedSFTTrainer(
                    batches=source,
                    collator=GraphCollator(0, config=model.config, pack=pack),
                    model=model,
                    args=sft.options(sft.SupervisedConfig(output=folder), rounds + 1),
                    processing_class=tokenizer.build(),
                )
                optimiser = torch.optim.AdamW(model.parameters(), 1e-5)
                made, taken, tokens = [], [], []
                for step in range(rounds + 1):
                    began = time.perf_counter()
                    inputs = trainer._part([{"part": step}])
                    made.append(time.perf_counter() - began)
                    trainer.compute_loss(model, inputs).backward()
                    optimiser.step()
                    optimiser.zero_grad()
                    taken.append(time.perf_counter() - began)
                    tokens.append(int(inputs["tokens"]))
                collation, step_time = statistics.median(made[1:]), statistics.median(taken[1:])
                report.rows.append(
                    {
                        "model": name,
                        "rows": f"packed to {pack}" if pack else "as they are",
                        "tokens": statistics.mean(tokens[1:]),
                        "collation": 1000 * collation,
                        "step": 1000 * step_time,
                        "share": 100 * statistics.median(m / t for m, t in zip(made[1:], taken[1:], strict=True)),
                    }
                )
                print(report.rows[-1], flush=True)
    report.save(RESULTS)
    print(report.markdown())


if __name__ == "__main__":
    main()
