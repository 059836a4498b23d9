"""Trains a model on dictation: ``python -m orchestra.training.dictation_sft CONFIG.yaml [key=value ...] [--resume]``.

Rows are whole runs of two workers in lock-step, computed by the parallel forward of `concurrent.py`. In some batches
the workers do not read each other, so that the model is at home there too: what it gets right then is chance, and not
the confusion of a model in a place where it has never been. Ends with a probe in true lock-step, with and without
sharing.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from orchestra.training import tokenizer
from orchestra.training.arguments import arguments, start
from orchestra.training.concurrent import concurrent_row, forward
from orchestra.training.config import read_config
from orchestra.training.dictation import HEADERS, PROMPT, TOKENS, WORDS, build_graph, draw
from orchestra.training.dictation_probe import probe


@dataclass(frozen=True)
class DictationConfig:
    """A training run; every field may stand in the YAML file or as ``key=value`` on the command line.

    Attributes:
        output: Folder of checkpoints and final model.
        seed: Fixes weights and data.
        steps: Optimiser steps, one batch each.
        batch_tokens: Words that the workers write in a batch.
        shortest: Fewest words of a worker in a run; the most are those of the task.
        alone: Share of the batches in which the workers do not read each other.
        alice_weight: Loss weight of Alice's words, which nobody can learn beyond their distribution. Bob's is 1.
        hidden: Width of the model.
        layers: Decoder layers.
        heads: Attention heads.
        key_heads: Heads of keys and values.
        intermediate: Width of the feed-forward layers.
        learning_rate: Peak learning rate, constant from the end of warm-up to the start of decay.
        warmup_steps: Steps of linear warm-up.
        decay_share: Share of the steps, at the end, over which the learning rate falls linearly to zero.
        weight_decay: AdamW's weight decay.
        save_every: Steps between checkpoints that a run can resume from.
        probe_runs: Runs of the final probe.
    """

    output: str = "runs/dictation"
    seed: int = 1
    steps: int = 2000
    batch_tokens: int = 1500
    shortest: int = 10
    alone: float = 0.2
    alice_weight: float = 0.5
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    key_heads: int = 2
    intermediate: int = 192
    learning_rate: float = 3e-3
    warmup_steps: int = 100
    decay_share: float = 0.5
    weight_decay: float = 0.01
    save_every: int = 500
    probe_runs: int = 512


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: a token a word."""
    return tokenizer.build(1024, WORDS)


def build_model(config: DictationConfig) -> LlamaForCausalLM:
    """The untrained model, its weights fixed by the seed."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer.vocabulary(WORDS)),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_heads,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.BOS,
            eos_token_id=tokenizer.EOS,
            pad_token_id=tokenizer.PAD,
            tie_word_embeddings=False,
        )
    )


class Batches:
    """The batch of a step is a function of the configuration and the step alone, so a resumed run sees the same."""

    def __init__(self, config: DictationConfig) -> None:
        self._config = config
        self._ids = tokenizer.vocabulary(WORDS)
        self._prompt = [tokenizer.BOS, *self._encode(PROMPT.split())]
        self._headers = self._encode([header.strip() for header in HEADERS])

    def _encode(self, words: Sequence[str]) -> list[int]:
        return [self._ids[tokenizer.MARK + word] for word in words]

    @lru_cache  # noqa: B019  # lives as long as the run
    def _layout(self, tokens: int, share: bool) -> dict[str, torch.Tensor]:
        graph = build_graph(self._prompt, self._headers, [[0] * tokens] * len(self._headers), share)
        graph.nodes[1].spans[1].weight = self._config.alice_weight
        row = concurrent_row(graph)
        return {
            "places": row.places,
            "weights": torch.tensor(row.weights),
            "predecessors": torch.tensor([before or 0 for before in row.predecessors]),
        }

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """Ids of the batch `[runs, tokens]`, and of its layout: places, loss weights, predecessors."""
        source = random.Random(f"{self._config.seed}:{step}")
        share = source.random() >= self._config.alone
        tokens = source.randint(self._config.shortest, TOKENS)
        rows = []
        for _ in range(self._config.batch_tokens // (2 * tokens)):
            words = [self._encode(written) for written in draw(source, tokens)]
            rows.append([*self._prompt, self._headers[0], *words[0], self._headers[1], *words[1]])
        return {"input_ids": torch.tensor(rows), **self._layout(tokens, share)}


class ConcurrentTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped to mypy
    """`Trainer` whose batches are rows of one concurrent layout."""

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The mean cross-entropy of what predecessors predict, weighted by token."""
        ids, weights = inputs["input_ids"], inputs["weights"]
        learned = weights > 0
        logits = forward(model, ids, inputs["places"])[:, inputs["predecessors"][learned]]
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, learned].flatten(), reduction="none")
        loss = (losses.view(len(ids), -1) * weights[learned]).sum(1).mean() / weights.sum()
        return (loss, logits) if return_outputs else loss


def train(config: DictationConfig, *, resume: bool = False) -> Path:
    """Train, probe, and write the final model with its tokenizer and what the probe found (`figures.json`).

    Args:
        config: What to train.
        resume: Continue from the newest checkpoint in the output folder.

    Returns:
        The folder of the final Hugging Face model.
    """
    output = start(config)
    batches = Batches(config)
    trainer = ConcurrentTrainer(
        model=build_model(config),
        args=TrainingArguments(**arguments(config, config.steps), adam_beta2=0.98, logging_steps=50),
        train_dataset=range(config.steps),
        data_collator=lambda steps: batches(steps[0]),
        processing_class=build_tokenizer(),
    )
    trainer.model_accepts_loss_kwargs = False
    trainer.train(resume_from_checkpoint=resume)
    final = output / "final"
    trainer.model.config.use_cache = True  # Trainer switches it off
    trainer.model.save_pretrained(final)
    trainer.processing_class.save_pretrained(final)
    found = [asdict(probe(trainer.model, trainer.processing_class, config.probe_runs, share=s)) for s in (True, False)]
    (output / "figures.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return final


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    resume = "--resume" in words
    words = [word for word in words if word != "--resume"]
    if not words:
        raise SystemExit("usage: python -m orchestra.training.dictation_sft CONFIG.yaml [key=value ...] [--resume]")
    try:
        config = read_config(DictationConfig, words[0], words[1:])
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if resume and not any(Path(config.output).glob("checkpoint-*")):
        raise SystemExit(f"nothing to resume: {config.output} holds no checkpoint")
    final = train(config, resume=resume)
    print((final.parent / "figures.json").read_text(encoding="utf-8") + str(final))


if __name__ == "__main__":
    main()
