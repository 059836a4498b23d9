"""A small batched evaluator for training runs: greedy or sampled Countdown with plain transformers.

Final figures come from the project's engine and strategies; this one needs nothing but a model in memory.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from orchestra.evaluation.countdown import Instance, Split, generate
from orchestra.evaluation.countdown_check import check, extract_answer
from orchestra.protocols import apr
from orchestra.training.tokenizer import BOS, EOS, IDS, PAD, SPECIAL, TAGS, encode

MARGIN = 16
"""Positions of the context that a completion leaves free."""
ROUNDS = 24

_TEXT = {i: word if word in ("\n", *TAGS) else f" {word}" for word, i in IDS.items() if word not in SPECIAL}


@dataclass(frozen=True)
class Report:
    """What a probe measured; tokens are means over instances, `within` maps critical paths to accuracies."""

    level: str
    split: str
    mode: str
    temperature: float
    items: int
    accuracy: float
    stderr: float
    sampled_tokens: float
    critical_path: float
    critical_path_95: float
    children: float
    seconds: float
    within: dict[int, float]


@dataclass
class Attempt:
    """One solution attempt."""

    text: str
    tokens: int = 0
    path: int = 0
    children: int = 0
    open: bool = True


@torch.inference_mode()
def complete(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    *,
    longest: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    batch: int = 64,
) -> list[list[int]]:
    """Continue every prompt until one of `stops` (included in what is returned) or `longest` tokens in all."""
    finished: list[list[int]] = []
    for start in range(0, len(prompts), batch):
        finished += _complete_batch(model, prompts[start : start + batch], stops, longest, temperature, generator)
    return finished


def _complete_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[int],
    longest: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    from transformers import DynamicCache

    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(one)) + list(one) for one in prompts])
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts])
    outputs: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    alive = [True] * len(prompts)
    cache = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    while True:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        for place, row in enumerate(rows):
            if alive[row]:
                token = int(chosen[place, 0])
                outputs[row].append(token)
                alive[row] = token not in stops and len(prompts[row]) + len(outputs[row]) < longest
        keep = [place for place, row in enumerate(rows) if alive[row]]
        if not keep:
            return outputs
        ids, positions = chosen, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(keep) < 0.75 * len(rows):
            index = torch.tensor(keep)
            rows = [rows[place] for place in keep]
            ids, positions, mask = ids[index], positions[index], mask[index]
            cache.batch_select_indices(index)


def text_of(ids: Sequence[int]) -> str:
    """The text of ids, special tokens left out."""
    return "".join(_TEXT.get(index, "") for index in ids)


def serial(model: Any, instances: Sequence[Instance], **sampling: Any) -> list[Attempt]:
    """One sequence for each instance."""
    outputs = complete(model, [[BOS, *encode(one.prompt)] for one in instances], [EOS], **sampling)
    return [Attempt(text_of(ids), len(ids), len(ids), open=False) for ids in outputs]


def spawn_join(
    model: Any, instances: Sequence[Instance], children: int | None = None, **sampling: Any
) -> list[Attempt]:
    """Parents and children, all instances round by round in lockstep."""
    attempts = [Attempt(one.prompt + apr.header(children)) for one in instances]
    for _ in range(ROUNDS):
        running = [attempt for attempt in attempts if attempt.open]
        if not running:
            break
        turns = complete(model, [[BOS, *encode(one.text)] for one in running], [EOS, IDS[apr.JOIN]], **sampling)
        jobs: list[tuple[Attempt, str]] = []
        for attempt, ids in zip(running, turns, strict=True):
            attempt.tokens += len(ids)
            attempt.path += len(ids)
            turn = text_of(ids)
            spawned = apr.parse_spawn(turn) if ids[-1] == IDS[apr.JOIN] else []
            jobs += [(attempt, apr.child_prompt(line, attempt.text)) for line in spawned]
            attempt.text += turn
            attempt.open = bool(spawned)
        replies = complete(model, [[BOS, *encode(prompt)] for _, prompt in jobs], [EOS], **sampling) if jobs else []
        for attempt in running:
            mine = [ids for (owner, _), ids in zip(jobs, replies, strict=True) if owner is attempt]
            if mine:
                attempt.tokens += sum(map(len, mine))
                attempt.path += max(map(len, mine))
                attempt.children += len(mine)
                attempt.text += apr.render_join(apr.child_result(text_of(ids)) for ids in mine)
    return attempts


def probe(
    model: Any,
    level: str,
    split: Split,
    items: int,
    *,
    mode: Literal["spawn_join", "serial"],
    children: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    longest: int | None = None,
) -> Report:
    """Accuracy, tokens and critical path on `items` instances of a split.

    Args:
        model: A causal model with the embedded model's vocabulary.
        level: Countdown level.
        split: Which instances; tune on ``dev`` only.
        items: How many.
        mode: Which behaviour.
        children: For spawn_join: the largest number of children of a round, None to leave it to the model.
        temperature: 0 for greedy.
        seed: Fixes instances and samples.
        longest: Cap on a sequence, prompt included; None for the model's context.
    """
    was_training = model.training
    model.eval()
    started = time.monotonic()
    instances = generate(level, split, items, seed)
    sampling: dict[str, Any] = {
        "longest": (longest or model.config.max_position_embeddings) - MARGIN,
        "temperature": temperature,
        "generator": torch.Generator().manual_seed(seed),
    }
    if mode == "serial":
        attempts = serial(model, instances, **sampling)
    else:
        attempts = spawn_join(model, instances, children, **sampling)
    model.train(was_training)
    right = [
        check(one.numbers, one.target, extract_answer(attempt.text) or "")
        for one, attempt in zip(instances, attempts, strict=True)
    ]
    paths = [attempt.path for attempt in attempts]
    accuracy = statistics.fmean(right)
    return Report(
        level=level,
        split=split,
        mode=mode if children is None else f"{mode}(children={children})",
        temperature=temperature,
        items=items,
        accuracy=round(accuracy, 4),
        stderr=round((accuracy * (1 - accuracy) / items) ** 0.5, 4),
        sampled_tokens=round(statistics.fmean(attempt.tokens for attempt in attempts), 1),
        critical_path=round(statistics.fmean(paths), 1),
        critical_path_95=sorted(paths)[min(len(paths) - 1, int(0.95 * len(paths)))],
        children=round(statistics.fmean(attempt.children for attempt in attempts), 2),
        seconds=round(time.monotonic() - started, 1),
        within={
            limit: round(statistics.fmean(ok and path <= limit for ok, path in zip(right, paths, strict=True)), 4)
            for limit in (256, 384, 512, 1024, 2048)
        },
    )


def main() -> None:
    """``python -m orchestra.training.probe MODEL LEVEL SPLIT ITEMS MODE [CHILDREN|free] [TEMPERATURE]``."""
    import json

    from transformers import AutoModelForCausalLM

    folder, level, split, items, mode, *rest = sys.argv[1:]
    children = int(rest[0]) if rest and rest[0] != "free" else None
    temperature = float(rest[1]) if len(rest) > 1 else 0.0
    model = AutoModelForCausalLM.from_pretrained(folder)
    report = probe(model, level, split, int(items), mode=mode, children=children, temperature=temperature)  # type: ignore[arg-type]  # mode: a plain str
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
