"""Trains the embedded model: ``python -m orchestra.training.sft configs/embedded.yaml [key=value ...] [--resume]``.

TRL's `SFTTrainer` with three changes: rows are step numbers whose batches `Mixture` draws, the loss is weighted by
token, and probes on the dev split run along. The model is a Llama of under a million parameters from scratch.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from datasets import Dataset
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from orchestra.training import tokenizer
from orchestra.training.arguments import arguments
from orchestra.training.config import TrainingConfig, load_config
from orchestra.training.mixture import HIT, MISS, Mixture, Row, Weights

MARKS = {"hit": HIT, "miss": MISS}


def build_model(config: TrainingConfig) -> LlamaForCausalLM:
    """The untrained model, its weights fixed by the seed."""
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer.vocabulary()),
            hidden_size=config.hidden,
            intermediate_size=config.intermediate,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            bos_token_id=tokenizer.BOS,
            eos_token_id=tokenizer.EOS,
            pad_token_id=tokenizer.PAD,
            tie_word_embeddings=False,
            initializer_range=0.02,
            attn_implementation="sdpa",
        )
    )
    return model


def build_mixture(config: TrainingConfig) -> Mixture:
    """The batches that the configuration asks for."""
    return Mixture(
        config.seed,
        config.batch_tokens,
        config.levels,
        unsolvable=config.unsolvable,
        conditioned=config.conditioned,
        most_children=config.most_children,
        weights=Weights(config.hit_weight, config.miss_weight, config.answer_weight),
        longest=config.context,
    )


def collate(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows padded on the right: ``input_ids`` and ``loss_weights``, both [rows, longest].

    There is no attention mask: under a causal mask no real token sees the padding, and padding weighs nothing.
    """
    longest = max(len(made.ids) for made in rows)
    ids = torch.full((len(rows), longest), tokenizer.PAD)
    weights = torch.zeros((len(rows), longest))
    for index, made in enumerate(rows):
        ids[index, : len(made.ids)] = torch.tensor(made.ids)
        weights[index, : len(made.weights)] = torch.tensor(made.weights)
    return {"input_ids": ids, "loss_weights": weights}


class Batches(Protocol):
    """Where batches come from: a function of the step alone, so that a resumed run sees the same."""

    def batch(self, step: int) -> list[Row]:
        """The batch of one optimiser step."""


class WeightedSFTTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped to mypy
    """`SFTTrainer` whose dataset rows are step numbers, drawn in order, and whose loss is weighted by token.

    `marks` names tokens whose accuracy is logged.
    """

    def __init__(self, *, mixture: Batches, marks: Mapping[str, int] = MARKS, **options: Any) -> None:
        super().__init__(data_collator=lambda examples: collate(mixture.batch(examples[0]["step"])), **options)
        self.marks = marks
        # The weighted mean below is already normalised; Trainer must not divide it by a token count.
        self.model_accepts_loss_kwargs = False
        self.tokens_seen = 0

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean cross-entropy weighted by ``loss_weights``; accuracies on marks go to the log."""
        ids, weights = inputs["input_ids"], inputs["loss_weights"][:, 1:]
        outputs = model(input_ids=ids[:, :-1], use_cache=False)
        labels = ids[:, 1:]
        losses = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses.view_as(weights) * weights).sum() / weights.sum()
        with torch.no_grad():
            self.tokens_seen += int((ids != tokenizer.PAD).sum())
            learned = weights > 0
            right = outputs.logits.argmax(-1) == labels
            groups = {name: labels == mark for name, mark in self.marks.items()} | {"token": learned}
            for name, chosen in groups.items():
                chosen = chosen & learned
                if bool(chosen.any()):
                    self._metrics["train"][f"{name}_accuracy"].append(float(right[chosen].float().mean()))
        return (loss, outputs) if return_outputs else loss


class Journal(TrainerCallback):  # type: ignore[misc]
    """Writes log lines to ``log.jsonl`` of a run's folder."""

    def __init__(self, output: str | Path) -> None:
        self.file = Path(output) / "log.jsonl"
        self.started = time.monotonic()
        self.trainer: WeightedSFTTrainer | None = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        seconds = round(time.monotonic() - self.started, 1)
        tokens = self.trainer.tokens_seen if self.trainer else 0
        shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": seconds, "tokens": tokens, **shown}) + "\n")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Keep a log line."""
        self.write(state.global_step, logs or {})


class ProbeJournal(Journal):
    """A journal of log lines and of probes."""

    def __init__(self, config: TrainingConfig) -> None:
        super().__init__(config.output)
        self.config = config

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe the model now and then."""
        if self.config.probe_every and state.global_step % self.config.probe_every == 0:
            from orchestra.training.probe import probe

            for level in self.config.levels:
                # A model that has not learned to stop would run to the end of the context.
                report = probe(kwargs["model"], level, "dev", self.config.probe_items, mode="spawn_join", longest=448)
                self.write(state.global_step, {"probe": asdict(report)})


def train_sft(config: TrainingConfig, *, resume: bool = False) -> Path:
    """Train, and write the final model with its tokenizer.

    Args:
        config: What to train.
        resume: Continue from the newest checkpoint in the output folder.

    Returns:
        The folder of the final Hugging Face model.
    """
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
    journal = ProbeJournal(config)
    options = SFTConfig(
        **arguments(config),
        adam_beta2=config.beta2,
        max_grad_norm=1.0,
        logging_steps=config.log_every,
        bf16=False,
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
    )
    trainer = WeightedSFTTrainer(
        mixture=build_mixture(config),
        model=build_model(config),
        args=options,
        train_dataset=Dataset.from_dict({"step": list(range(config.steps))}),
        processing_class=tokenizer.build(config.context),
        callbacks=[journal],
    )
    journal.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    final = output / "final"
    trainer.model.config.use_cache = True  # Trainer switches it off
    trainer.save_model(str(final))
    return final


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the module."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    resume = "--resume" in words
    words = [word for word in words if word != "--resume"]
    if not words:
        raise SystemExit("usage: python -m orchestra.training.sft CONFIG.yaml [key=value ...] [--resume]")
    try:
        config = load_config(words[0], words[1:])
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from error
    if resume and not any(Path(config.output).glob("checkpoint-*")):
        raise SystemExit(f"nothing to resume: {config.output} holds no checkpoint")
    print(train_sft(config, resume=resume))


if __name__ == "__main__":
    main()
