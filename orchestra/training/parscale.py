"""Recycles a trained model with parallel streams: `orchestra train parscale CONFIG.yaml [key=value ...] [--resume]`.

The whole model learns, or the prefixes and the aggregation network alone. With one stream the same run trains the plain
model on the same batches in the same order, which is what a comparison needs.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from orchestra.errors import UsageError
from orchestra.parscale.initial import fresh_streams
from orchestra.parscale.layout import is_parscale, read_config
from orchestra.parscale.model import ParScale
from orchestra.runtime.local.sources import load_tokenizer
from orchestra.training.arguments import arguments, start
from orchestra.training.collate import GraphCollator
from orchestra.training.config import ParScaleConfig
from orchestra.training.flatten import Row
from orchestra.training.journal import Journal
from orchestra.training.parscale_data import load_data
from orchestra.training.tokenizer import PAD
from orchestra.training.trainer import WeightedSFTTrainer


class Validation(NamedTuple):
    """Mean loss of the held-out tokens (in nats, weighted), and its standard error over rows."""

    loss: float
    stderr: float


def build_model(config: ParScaleConfig) -> Any:
    """The model at the start of a run, in float32.

    Raises:
        UsageError: there is no such backbone, or it cannot have streams; or nothing would be trained.
    """
    if config.train not in ("all", "streams"):
        raise UsageError(f"train is all or streams, not {config.train!r}")
    if config.streams < 1 or (config.streams == 1 and config.train == "streams"):
        raise UsageError(f"streams: {config.streams} leaves nothing to train (train: {config.train})")
    if not config.backbone:
        raise UsageError("backbone: is missing: a folder or Hugging Face id of a causal model")
    fresh: dict[str, Any] = {"prefix_tokens": config.prefix_tokens, "smoothing": config.smoothing, "seed": config.seed}
    fresh["key_std"] = config.key_std
    if is_parscale(read_config(config.backbone)):
        model = ParScale.from_pretrained(config.backbone, dtype=torch.float32)
        if model.config.parscale_n != config.streams:
            model.set_streams(None)
            if config.streams > 1:
                model.set_streams(fresh_streams(model, config.streams, **fresh))
    else:
        model = ParScale.recycle(config.backbone, config.streams, **fresh).float()
    if config.train == "streams":
        model.freeze_backbone()
    return model


@torch.no_grad()
def row_losses(model: Any, batches: list[list[Row]]) -> Tensor:
    """Of each row the summed weighted cross-entropy in nats, and the summed weights: `[rows, 2]`, in float64."""
    training = model.training
    model.eval()
    collate = GraphCollator(PAD)
    found = []
    for batch in batches:
        inputs = {name: tensor.to(model.device) for name, tensor in collate(batch).items()}
        ids, weights = inputs["input_ids"], inputs["loss_weights"][:, 1:].double()
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        found.append(torch.stack([(losses.view_as(weights) * weights).sum(1), weights.sum(1)], 1).cpu())
    model.train(training)
    return torch.cat(found)


def validate(model: Any, batches: list[list[Row]]) -> Validation:
    """The weighted mean loss of the rows; rows are what the standard error takes for independent."""
    losses = row_losses(model, batches)
    total, weight = losses.sum(0).tolist()
    mean = total / weight
    rows = len(losses)
    scatter = float((losses[:, 0] - mean * losses[:, 1]).square().sum())
    return Validation(mean, math.sqrt(scatter * rows / max(rows - 1, 1)) / weight)


class ValidationJournal(Journal):
    """A journal of log lines and of validations: before the first step, now and then, and after the last."""

    def __init__(self, config: ParScaleConfig, held_out: list[list[Row]]) -> None:
        super().__init__(config.output)
        self.config, self.held_out = config, held_out

    def _validate(self, step: int, model: Any) -> None:
        found = validate(model, self.held_out)
        self.write(step, {"validation_loss": found.loss, "validation_stderr": found.stderr})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Validate what a new run starts from."""
        if state.global_step == 0:
            self._validate(0, kwargs["model"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Validate in turn."""
        every = self.config.validate_every
        if state.global_step == self.config.steps or (every and state.global_step % every == 0):
            self._validate(state.global_step, kwargs["model"])


class StreamTrainer(WeightedSFTTrainer):
    """A trainer with a learning rate for the streams' own parameters."""

    def __init__(self, *, stream_learning_rate: float | None, **options: Any) -> None:
        super().__init__(**options)
        self._stream_learning_rate = stream_learning_rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, its groups split where the streams have a learning rate of their own."""
        new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if new and self._stream_learning_rate is not None:
            streams = {id(parameter) for parameter in self.model.stream_parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in streams]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in streams]
                if own:
                    optimizer.add_param_group({**group, "params": own, "lr": self._stream_learning_rate})
        return optimizer


def train_parscale(config: ParScaleConfig, *, resume: bool = False) -> Path:
    """Train, and write the final model in the published layout with its tokenizer.

    Args:
        config: What to train.
        resume: Continue from the newest checkpoint in the output folder.

    Returns:
        The folder of the final model; see `ParScale.from_pretrained`.

    Raises:
        UsageError: backbone, data or numbers do not go together.
    """
    model = build_model(config)
    tokenizer = load_tokenizer(config.backbone)
    data = load_data(config, tokenizer)
    output = start(config)
    journal = ValidationJournal(config, data.held_out)
    options = SFTConfig(
        **arguments(config, config.steps),
        adam_beta2=config.beta2,
        max_grad_norm=1.0,
        logging_steps=config.log_every,
        bf16=config.bf16,
        gradient_checkpointing=config.gradient_checkpointing,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_num_workers=0,
    )
    trainer = StreamTrainer(
        batches=data.training,
        collator=GraphCollator(PAD),
        stream_learning_rate=config.stream_learning_rate,
        model=model,
        args=options,
        processing_class=tokenizer,
        callbacks=[journal],
    )
    journal.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    trainer.model.config.use_cache = True  # Trainer switches it off
    trainer.save_model(str(output / "final"))
    return output / "final"
