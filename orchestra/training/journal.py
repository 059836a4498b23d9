"""The log of a training run, beside whatever transformers reports to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from orchestra.training.trainer import WeightedSFTTrainer


class Journal(TrainerCallback):  # type: ignore[misc]  # transformers is untyped to mypy
    """Writes log lines to ``log.jsonl`` of a run's folder.

    With `seconds` of wall time, those of the first process's CPU, and the `tokens` that it has seen, where its trainer
    counts them.
    """

    def __init__(self, output: str | Path) -> None:
        self.file = Path(output) / "log.jsonl"
        self.started = time.monotonic()
        self.trainer: WeightedSFTTrainer | None = None

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line."""
        times = {"seconds": round(time.monotonic() - self.started, 1), "cpu_seconds": round(time.process_time(), 1)}
        seen = {"tokens": self.trainer.tokens_seen} if self.trainer else {}
        shown = {key: round(value, 6) if isinstance(value, float) else value for key, value in values.items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **times, **seen, **shown}) + "\n")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Keep a log line."""
        if state.is_world_process_zero:
            self.write(state.global_step, logs or {})
