"""What all trainings say to transformers' trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from orchestra.training.config import ParScaleConfig, TrainingConfig
    from orchestra.training.dictation_sft import DictationConfig


def arguments(config: TrainingConfig | ParScaleConfig | DictationConfig) -> dict[str, Any]:
    """Of `TrainingArguments`: a batch a step, made by the collator; warm-up, constant, then linear decay to zero."""
    return {
        "output_dir": config.output,
        "seed": config.seed,
        "max_steps": config.steps,
        "per_device_train_batch_size": 1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": {"num_decay_steps": int(config.steps * config.decay_share), "decay_type": "linear"},
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "use_cpu": not torch.cuda.is_available(),
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }
