"""The configuration of `orchestra train grpo`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestra.errors import UsageError
from orchestra.training.advantages import Mean, Scale


@dataclass(frozen=True)
class GRPORun:
    """A reinforcement learning run; every field may stand in the YAML file or as ``key=value`` on the command line.

    Attributes:
        model: Folder or Hugging Face id of the model to train.
        output: Folder of checkpoints, log and final model.
        engine: URL of what plays the rollouts; empty: the model in this process. Its weights are those of the trained
            model from the first step on: `local:`, `sglang:` and `sglang://` engines can be given new ones.
        engines: Further engines by alias, for strategies with judges elsewhere.
        task: A task of `orchestra tasks` that has a train split (countdown), or a JSONL file with a `prompt` (text or
            messages) and an `answer` a line.
        levels: Of the task, and their shares of the prompts.
        items: How many prompts there are; they are gone through again and again, shuffled.
        seed: Fixes prompts, their order, and all that rollouts draw.
        strategies: Who makes the rollouts: specs, or `{strategy: SPEC, share: 0.5, draw: {children: [4, 8]}}`.
        rewards: What is summed up: names, or `{reward: NAME, weight: 0.5, PARAMETER: VALUE}`; see
            `orchestra.training.rewards`.
        protocol: The language that the share of malformed rollouts is counted by; empty: not counted.
        group: Rollouts of a prompt.
        prompts: Prompts of a generation, over all processes.
        minibatches: Optimiser steps that a generation is split into.
        epochs: How often each of them is learned from.
        rows: Rollouts of one forward and backward; changes nothing but memory and speed.
        steps: Optimiser steps.
        advantage: What centred rewards are divided by: the standard deviation of their `group`, `none`, or `batch`.
        mean: What the loss is the mean of: `calls` (APR) or `tokens` (ThreadWeaver).
        clip_low: The ratio to the policy that made the rollouts is clipped below 1 - this.
        clip_high: And above 1 + this; None: as below.
        sampler_cap: The ratio of that policy's probabilities, as the trainer computes them, to the sampler's is
            truncated at this; None leaves it out.
        kl: Weight of the divergence from the model at the start (k3); 0: it is not computed.
        learning_rate: Peak learning rate.
        schedule: Of the learning rate after warm-up, as transformers names it.
        warmup_steps: Steps of linear warm-up.
        weight_decay: AdamW's weight decay.
        beta2: AdamW's second beta (the first is 0.9).
        max_grad_norm: Gradients are clipped to this norm.
        temperature: Of rollouts; what is trained is the policy at this temperature.
        max_tokens: Most tokens of a generation.
        budget: Of a rollout, such as `sampled_tokens=4096`.
        concurrency: Rollouts at a time.
        tries: How often a rollout is played before it counts as failed.
        patience: Seconds for which the engine may be gone before the run ends.
        lora: Arguments of PEFT's `LoraConfig`; None trains all weights.
        bf16: Compute in bfloat16.
        gradient_checkpointing: Save memory by computing activations twice.
        log_every: Optimiser steps between log lines.
        save_every: Optimiser steps between checkpoints; rounded up to whole generations.
        report_to: Where the log goes besides, as transformers names it (`tensorboard`, `wandb`, ...).
    """

    model: str = ""
    output: str = "runs/grpo"
    engine: str = ""
    engines: Mapping[str, str] = field(default_factory=dict)
    task: str = "countdown"
    levels: Mapping[str, float] = field(default_factory=lambda: {"hard": 1.0})
    items: int = 10_000
    seed: int = 1
    strategies: list[Any] = field(default_factory=lambda: ["spawn_join"])
    rewards: list[Any] = field(default_factory=lambda: ["correctness"])
    protocol: str = ""
    group: int = 8
    prompts: int = 16
    minibatches: int = 1
    epochs: int = 1
    rows: int = 8
    steps: int = 100
    advantage: Scale = "group"
    mean: Mean = "calls"
    clip_low: float = 0.2
    clip_high: float | None = None
    sampler_cap: float | None = 2.0
    kl: float = 0.0
    learning_rate: float = 1e-5
    schedule: str = "constant_with_warmup"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    beta2: float = 0.999
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    max_tokens: int | None = None
    budget: str | None = None
    concurrency: int = 256
    tries: int = 3
    patience: float = 600.0
    lora: Mapping[str, Any] | None = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    log_every: int = 1
    save_every: int = 20
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in _NUMBERS:  # YAML reads 1e-5 (no dot) as text
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, float(value))
        if not self.model:
            raise UsageError("model= says which model to train: a folder or a Hugging Face id")
        for name in ("group", "prompts", "minibatches", "epochs", "rows", "steps", "items", "tries", "concurrency"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UsageError(f"{name} is a number of at least 1, not {value!r}")
        if not self.strategies or not self.rewards:
            raise UsageError("a run has at least one of strategies and one of rewards")
        if not self.temperature > 0:
            raise UsageError(f"rollouts are sampled: temperature is above 0, not {self.temperature:g}")

    @property
    def turn(self) -> int:
        """Optimiser steps from one generation to the next."""
        return self.minibatches * self.epochs


_NUMBERS = (
    "clip_low", "clip_high", "sampler_cap", "kl", "learning_rate", "weight_decay", "beta2", "max_grad_norm",
    "temperature", "patience",
)  # fmt: skip
