"""What all trainings say to transformers' trainer, and how they begin and end."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

if TYPE_CHECKING:
    from orchestra.training.config import ParScaleConfig
    from orchestra.training.dictation_sft import DictationConfig
    from orchestra.training.grpo_config import GRPORun
    from orchestra.training.sft_config import SupervisedConfig


def arguments(config: SupervisedConfig | ParScaleConfig | DictationConfig, steps: int) -> dict[str, Any]:
    """Of `TrainingArguments`: a batch a step, made by the collator; warm-up, constant, then linear decay to zero."""
    return {
        "output_dir": config.output,
        "seed": config.seed,
        "max_steps": steps,
        "per_device_train_batch_size": 1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": int(steps * config.decay_share), "decay_type": "linear"},
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }


def processes() -> Any:
    """Accelerate's state of all processes of a run. Without a GPU it must be told so: else it knows of one process."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def start(config: SupervisedConfig | ParScaleConfig | DictationConfig | GRPORun) -> Path:
    """The output folder, with the configuration in it."""
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.yaml").write_text(yaml.safe_dump(_plain(asdict(config)), sort_keys=False), encoding="utf-8")
    return output


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can say."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
