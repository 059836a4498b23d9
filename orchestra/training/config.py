"""The configuration of a training run: a YAML file and overrides. Here: how it is read, and that of ParScale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import TypeAdapter, ValidationError

from orchestra.errors import UsageError

Config = TypeVar("Config")


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


def read_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and ``key=value`` overrides into a dataclass, whose fields may be dataclasses themselves.

    Values are YAML, and are brought to the types of their fields (YAML itself reads 2e-3, without a dot, as text).
    ``lora.r=8`` changes one key of a mapping and leaves the others.

    Raises:
        UsageError: A key is unknown, a value is none of its field's, or an override has no equals sign.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise UsageError(f"{path} is not a mapping of keys to values")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"override {override!r} is not of the form key=value")
        _set(values, key.split("."), yaml.safe_load(value) if value else "", override)
    known = [known_field.name for known_field in fields(cast(Any, kind))]
    unknown = sorted(str(key) for key in set(values) - set(known))
    if unknown:
        raise UsageError(f"unknown key {', '.join(unknown)} in {path}: choose from {', '.join(known)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UsageError("; ".join(_said(kind, found) for found in error.errors())) from error


def _set(values: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    for key in keys[:-1]:
        values[key] = {} if values.get(key) is None else values[key]
        values = values[key]
        if not isinstance(values, dict):
            raise UsageError(f"override {override!r}: {key} is not a mapping")
    values[keys[-1]] = value


def _said(kind: type[Any], error: Any) -> str:
    """One finding of pydantic's as a phrase."""
    place = ".".join(str(part) for part in error["loc"] if not str(part)[:1].isupper())
    if error["type"] == "unexpected_keyword_argument" or error["type"] == "extra_forbidden":
        return f"unknown key {place}"
    return f"{place}: {error['msg']}"
