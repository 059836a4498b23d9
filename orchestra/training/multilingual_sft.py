"""Trains the multilingual model: ``python -m orchestra.training.multilingual_sft configs/multilingual.yaml``.

It goes on from the model that speaks serial search and spawn/join alone: that one's vocabulary grows by words and tags,
and all behaviours, the old ones too, are trained together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig

from orchestra.training import tokenizer
from orchestra.training.arguments import arguments
from orchestra.training.collate import GraphCollator, weighted_loss
from orchestra.training.config import read_config
from orchestra.training.mixture import Mixture, Weights
from orchestra.training.multilingual import Languages
from orchestra.training.parallel_demonstrations import DRAFTS, OPENINGS
from orchestra.training.sft import Journal, WeightedSFTTrainer


@dataclass(frozen=True)
class MultilingualConfig:
    """A run of `train`; every field may stand in the YAML file or as ``key=value`` on the command line.

    Attributes:
        output: folder of checkpoints, log and final model.
        start: folder of the model to go on from; its vocabulary is `tokenizer.WORDS`.
        seed: fixes new rows of the vocabulary, and the data.
        steps: optimiser steps, one batch each.
        batch_tokens: tokens of a batch, padding included.
        levels: Countdown levels and their shares, of the old behaviours.
        new_levels: the same of the new ones.
        longest: rows of new behaviours above this are left out.
        unsolvable, conditioned, most_children, hit_weight, miss_weight, answer_weight: as in `TrainingConfig`.
        plan_weight, choice_weight: see `Weights`.
        spelled: see `Languages`.
        learning_rate: peak, constant from the end of warm-up to the start of decay.
        warmup_steps: steps of linear warm-up.
        decay_share: share of the steps, at the end, over which the learning rate falls linearly to zero.
        beta2, weight_decay: AdamW's.
        log_every, save_every: steps between log lines, and between checkpoints that a run can resume from.
    """

    output: str = "runs/multilingual"
    start: str = "runs/embedded/final"
    seed: int = 1
    steps: int = 4000
    batch_tokens: int = 3000
    levels: dict[str, float] = field(default_factory=lambda: {"small": 0.6, "hard": 0.4})
    new_levels: dict[str, float] = field(default_factory=lambda: {"small": 0.2, "hard": 0.8})
    longest: int = 2000
    unsolvable: float = 0.04
    conditioned: float = 0.25
    most_children: int = 16
    hit_weight: float = 6.0
    miss_weight: float = 2.0
    answer_weight: float = 4.0
    plan_weight: float = 1.0
    choice_weight: float = 4.0
    spelled: bool = False
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.5
    beta2: float = 0.98
    weight_decay: float = 0.01
    log_every: int = 50
    save_every: int = 250


def grow(model: LlamaForCausalLM, seed: int) -> None:
    """Add rows for `LANGUAGE_WORDS` and `TAGS`: the mean of the old ones, and noise of their spread, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    old = model.get_input_embeddings().weight.shape[0]
    size = len(tokenizer.IDS)
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            mean, spread = table[:old].mean(0), table[:old].std(0)
            table[old:] = mean + spread * torch.randn(size - old, table.shape[1], generator=generator)


class MultilingualTrainer(WeightedSFTTrainer):
    """Batches of thread graphs; see `GraphCollator`."""

    def __init__(self, *, languages: Languages, **options: Any) -> None:
        super().__init__(mixture=languages, **options)
        collate = GraphCollator(tokenizer.PAD, config=self.model.config)
        self.data_collator = lambda examples: collate(languages.batch(examples[0]["step"]))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross-entropy weighted by ``loss_weights``; accuracies on marks go to the log."""
        labels, weights = inputs.pop("labels"), inputs.pop("loss_weights")
        outputs = model(**inputs, use_cache=False)
        loss = weighted_loss(outputs.logits, labels, weights)
        with torch.no_grad():
            self.tokens_seen += int((inputs["input_ids"] != tokenizer.PAD).sum())
            learned, labels = weights[:, 1:] > 0, labels[:, 1:]
            right = outputs.logits[:, :-1].argmax(-1) == labels
            groups = {name: labels == mark for name, mark in self.marks.items()} | {"token": learned}
            for name, chosen in groups.items():
                chosen = chosen & learned
                if bool(chosen.any()):
                    self._metrics["train"][f"{name}_accuracy"].append(float(right[chosen].float().mean()))
        return (loss, outputs) if return_outputs else loss


def build_languages(config: MultilingualConfig) -> Languages:
    """The batches that the configuration asks for."""
    weights = Weights(
        config.hit_weight,
        config.miss_weight,
        config.answer_weight,
        plan=config.plan_weight,
        choice=config.choice_weight,
    )
    old = Mixture(
        config.seed + 1,  # what the first stage has not seen
        config.batch_tokens,
        config.levels,
        unsolvable=config.unsolvable,
        conditioned=config.conditioned,
        most_children=config.most_children,
        weights=weights,
    )
    return Languages(old, config.seed, config.batch_tokens, config.new_levels, weights, config.longest, config.spelled)


def train(config: MultilingualConfig, *, resume: bool = False) -> Path:
    """Train, and write the final model with its tokenizer.

    Returns:
        The folder of the final Hugging Face model.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(config.start, attn_implementation="sdpa")
    grow(model, config.seed)
    journal = Journal(output)
    trainer = MultilingualTrainer(
        languages=build_languages(config),
        model=model,
        args=SFTConfig(
            **arguments(config),
            adam_beta2=config.beta2,
            max_grad_norm=1.0,
            logging_steps=config.log_every,
            bf16=False,
            gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            dataloader_num_workers=0,
        ),
        train_dataset=Dataset.from_dict({"step": list(range(config.steps))}),
        processing_class=tokenizer.multilingual(model.config.max_position_embeddings),
        callbacks=[journal],
    )
    journal.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    final = output / "final"
    trainer.model.config.use_cache = True  # Trainer switches it off
    trainer.save_model(str(final))
    tell_openings(final)
    return final


def tell_openings(folder: Path) -> None:
    """Write into a model's ``config.json`` what is forced so that it speaks a language; see `Engine.openings`."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["orchestra"] = {"openings": {**OPENINGS, "drafts": DRAFTS}}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main(words: Sequence[str]) -> None:
    """Command line of the module."""
    resume = "--resume" in words
    words = [word for word in words if word != "--resume"]
    if not words:
        raise SystemExit("usage: python -m orchestra.training.multilingual_sft CONFIG.yaml [key=value ...] [--resume]")
    try:
        config = read_config(MultilingualConfig, words[0], words[1:])
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    print(train(config, resume=resume))


if __name__ == "__main__":
    main(sys.argv[1:])
