"""The configuration of a training run: a YAML file and overrides. Here: that of the embedded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

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
    for key in ("learning_rate", "weight_decay"):
        if key in values:
            values[key] = float(values[key])
    return kind(**values)
