"""The configuration of a training run: a YAML file and overrides. Here: that of the embedded model and of ParScale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Config = TypeVar("Config")


@dataclass(frozen=True)
class TrainingConfig:
    """A training run; every field may stand in the YAML file or as ``key=value`` on the command line.

    Attributes:
        output: Folder of checkpoints, log and final model.
        seed: Fixes weights and data.
        steps: Optimiser steps, one batch each.
        batch_tokens: Tokens of a batch, padding included.
        levels: Countdown levels and their shares.
        unsolvable: Share of small problems without a solution.
        conditioned: Share of parents with a number of children in their header.
        most_children: The largest such number.
        hit_weight: Loss weight of hit marks.
        miss_weight: Loss weight of miss marks.
        answer_weight: Loss weight of everything after an answer tag.
        hidden: Width of the model.
        layers: Decoder layers.
        heads: Attention heads.
        intermediate: Width of the feed-forward layers.
        context: Longest sequence.
        learning_rate: Peak learning rate, constant from the end of warm-up to the start of decay.
        warmup_steps: Steps of linear warm-up.
        decay_share: Share of the steps, at the end, over which the learning rate falls linearly to zero.
        beta2: AdamW's second beta (the first is 0.9).
        weight_decay: AdamW's weight decay.
        log_every: Steps between log lines.
        save_every: Steps between checkpoints that a run can resume from.
        probe_every: Steps between probes on the dev split; 0 for none.
        probe_items: Instances of a probe per level.
    """

    output: str = "runs/embedded"
    seed: int = 1
    steps: int = 9000
    batch_tokens: int = 3000
    levels: dict[str, float] = field(default_factory=lambda: {"small": 0.5, "hard": 0.5})
    unsolvable: float = 0.04
    conditioned: float = 0.25
    most_children: int = 16
    hit_weight: float = 6.0
    miss_weight: float = 2.0
    answer_weight: float = 4.0
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 384
    context: int = 4096
    learning_rate: float = 2.5e-3
    warmup_steps: int = 100
    decay_share: float = 0.4
    beta2: float = 0.98
    weight_decay: float = 0.01
    log_every: int = 50
    save_every: int = 750
    probe_every: int = 750
    probe_items: int = 32


@dataclass(frozen=True)
class ParScaleConfig:
    """The recycling of a trained model with parallel streams (arXiv:2505.10475, section 4).

    Attributes:
        output: Folder of checkpoints, log and final model.
        backbone: Folder or Hugging Face id of a causal model, or of a ParScale checkpoint (whose streams are kept if
            there are as many as `streams`).
        streams: How many; 1 trains the plain model, for comparison.
        prefix_tokens: Length of the learned prefixes.
        smoothing: Part of the streams' weight that is shared out evenly.
        key_std: Standard deviation of a fresh prefix's keys; that of the backbone's initial weights if it is not given.
        train: What is trained: `all`, or the `streams` alone, with the backbone frozen.
        data: `countdown` (generated, for models with the embedded model's words), a JSONL file, a folder of `datasets`,
            or a Hugging Face data set id.
        split: Of a Hugging Face data set.
        levels: Countdown levels and their shares.
        held_out: Rows for validation; those of Countdown come from the dev split, and are the same for every seed.
        seed: Fixes the streams' first parameters, and the batches with their order.
        steps: Optimiser steps, one batch each.
        batch_tokens: Tokens of a batch, padding included.
        longest: Longest sequence in tokens.
        learning_rate: Peak learning rate, constant from the end of warm-up to the start of decay.
        stream_learning_rate: That of the streams' parameters, if it is another.
        warmup_steps: Steps of linear warm-up.
        decay_share: Share of the steps, at the end, over which the learning rate falls linearly to zero.
        beta2: AdamW's second beta (the first is 0.9).
        weight_decay: AdamW's weight decay.
        bf16: Compute in bfloat16.
        gradient_checkpointing: Save memory by computing activations twice.
        log_every: Steps between log lines.
        validate_every: Steps between validations; 0 for one before and one after.
        save_every: Steps between checkpoints that a run can resume from.
    """

    output: str = "runs/parscale"
    backbone: str = ""
    streams: int = 4
    prefix_tokens: int = 48
    smoothing: float = 0.1
    key_std: float | None = None
    train: Literal["all", "streams"] = "all"
    data: str = "countdown"
    split: str = "train"
    levels: dict[str, float] = field(default_factory=lambda: {"small": 0.5, "hard": 0.5})
    held_out: int = 256
    seed: int = 1
    steps: int = 1000
    batch_tokens: int = 3000
    longest: int = 4096
    learning_rate: float = 1e-4
    stream_learning_rate: float | None = None
    warmup_steps: int = 20
    decay_share: float = 0.4
    beta2: float = 0.98
    weight_decay: float = 0.01
    bf16: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 10
    validate_every: int = 100
    save_every: int = 100


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The configuration of the embedded model's training; see `read_config`."""
    return read_config(TrainingConfig, path, overrides)


def read_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and ``key=value`` overrides (values are YAML too) into a dataclass.

    Raises:
        ValueError: A key is unknown or an override has no equals sign.
    """
    values: dict[str, Any] = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} is not of the form key=value")
        values[key] = yaml.safe_load(value)
    known = [known_field.name for known_field in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)} in {path}: choose from {', '.join(known)}")
    # YAML reads 2e-3 (no dot) as text.
    for key in ("learning_rate", "stream_learning_rate", "weight_decay", "key_std"):
        if isinstance(values.get(key), str | int):
            values[key] = float(values[key])
    return kind(**values)
