"""A model that spawns its children at once or one by one, half of the time each: where RL's acceleration is measured.

Goes on training the embedded model on parents whose forced header says `children: free`. Half of them then spawn all
children in one round; the others look at the same first steps one after the other, a round for each, until one
succeeds. What a child does, and so what a parent finds, is the same; only the critical path differs.

    OMP_NUM_THREADS=1 python benchmarks/adaptive_sft.py runs/adaptive [steps=250] [seed=1]
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from orchestra.evaluation.countdown import Instance
from orchestra.protocols import apr
from orchestra.runtime.connect import EMBEDDED
from orchestra.training import demonstrations
from orchestra.training.demonstrations import Demonstration, Segment
from orchestra.training.mixture import Mixture
from orchestra.training.tokenizer import PAD

PEAK, WARMUP = 5e-4, 20


def one_by_one(instance: Instance, rng: random.Random) -> Demonstration:
    """A parent that spawns a child a round."""
    parent, _ = demonstrations.spawn_join(instance, rng)
    segments = [parent.segments[0]]
    results = parent.segments[2].text.strip("\n").split("\n")
    for spawned, result in zip(parent.segments[1].text.split("\n")[:-1], results, strict=True):
        segments += [Segment(f"{spawned}\n {apr.JOIN}", learn=True), Segment(f"\n{result}\n", learn=False)]
        if result.strip() != apr.NONE:
            break
    return Demonstration("parent", (*segments, parent.segments[-1]), parent.solved)


class Adaptive(Mixture):
    """Both behaviours after one and the same header, and the children of both."""

    def _demonstrations(self, kind: str, rng: random.Random) -> Iterator[Demonstration]:
        for instance in self._instances(rng):
            yield demonstrations.spawn_join(instance, rng)[0]
            yield one_by_one(instance, rng)
            yield from demonstrations.balanced_children(instance, rng)


def train(folder: Path, steps: int, seed: int) -> None:
    """Train and save."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    mixture = Adaptive(seed, 3000, {"hard": 1.0}, conditioned=0.0)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    rate = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / WARMUP, 1 - step / steps))
    began = time.monotonic()
    for step in range(steps):
        rows = mixture.batch(step)
        longest = max(len(row.ids) for row in rows)
        ids = torch.tensor([row.ids + [PAD] * (longest - len(row.ids)) for row in rows])
        weights = torch.tensor([row.weights + [0.0] * (longest - len(row.ids)) for row in rows])[:, 1:]
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rate.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(folder)


if __name__ == "__main__":
    options = dict(word.split("=") for word in sys.argv[2:])
    train(Path(sys.argv[1]), int(options.get("steps", 250)), int(options.get("seed", 1)))
