"""Plays dictation in lock-step with a model in memory, and counts what Bob got right.

Final figures come from the engine and its strategy; this needs nothing but plain transformers.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from orchestra.training.dictation import HEADERS, LETTERS, PROMPT, TOKENS, score
from orchestra.training.lockstep import Feed, LockStep


@dataclass(frozen=True)
class Report:
    """What a probe measured.

    Attributes:
        share: whether the workers read each other.
        runs: how many.
        accuracy: share of Bob's words, from the second on, that are what Alice said in the step before.
        stderr: its standard error, runs being independent of each other.
        letters: share of Alice's words that are letters.
        repeats: share of her words that she had said before.
        entropy: of her letters over all runs, in bits (at most log2 26 = 4.70).
    """

    share: bool
    runs: int
    accuracy: float
    stderr: float
    letters: float
    repeats: float
    entropy: float


@torch.inference_mode()
def play(
    model: Any, words: Any, runs: int, *, share: bool, temperature: float = 1.0, seed: int = 0
) -> list[tuple[str, str]]:
    """What Alice and Bob write, in lock-step, header included.

    Args:
        model: a Llama-like Hugging Face model.
        words: its tokenizer.
        runs: how many, in one batch.
        share: whether the workers read each other.
        temperature: of both; 0 is greedy.
        seed: of the samples.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = LockStep(model)
    prompt, *headers = (words(text, add_special_tokens=i == 0).input_ids for i, text in enumerate((PROMPT, *HEADERS)))
    for token in prompt:
        cache.step({"prompt": Feed(torch.full((runs,), token))})
    views = [["prompt", HEADERS[1 - worker]] if share else ["prompt"] for worker in range(2)]
    written = [torch.tensor(header).expand(runs, -1) for header in headers]
    for _ in range(TOKENS):
        logits = cache.step(
            {
                header: Feed(done[:, -1], [(block, None) for block in view])
                for header, done, view in zip(HEADERS, written, views, strict=True)
            }
        )
        for worker, header in enumerate(HEADERS):
            if temperature:
                odds = (logits[header] / temperature).softmax(-1)
                token = torch.multinomial(odds, 1, generator=generator)
            else:
                token = logits[header].argmax(-1, keepdim=True)
            written[worker] = torch.cat([written[worker], token], 1)
    alice, bob = (words.batch_decode(done) for done in written)
    return list(zip(alice, bob, strict=True))


def probe(model: Any, words: Any, runs: int, *, share: bool, temperature: float = 1.0, seed: int = 0) -> Report:
    """Play and count; arguments as for `play`."""
    played = play(model, words, runs, share=share, temperature=temperature, seed=seed)
    rates = torch.tensor([right / scored for right, scored in (score(*run) for run in played)])
    said = [alice.split()[1:] for alice, _ in played]
    total = sum(len(run) for run in said)
    counts = Counter(word for run in said for word in run if word in LETTERS)
    return Report(
        share=share,
        runs=runs,
        accuracy=float(rates.mean()),
        stderr=float(rates.std() / math.sqrt(runs)),
        letters=counts.total() / total,
        repeats=1 - sum(len(set(run)) for run in said) / total,
        entropy=-sum(count / counts.total() * math.log2(count / counts.total()) for count in counts.values()),
    )
