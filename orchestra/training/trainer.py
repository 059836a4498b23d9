"""The one trainer of all supervised runs: TRL's `SFTTrainer` on batches of rows, with a weight for each token.

A batch is a function of the step alone, so a resumed run sees what an uninterrupted one would have seen. It is shared
out among processes and accumulated forward passes, and its loss is the weighted mean over all of it: however it is
shared out, the gradient is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Protocol

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import TrainerControl
from trl import SFTConfig, SFTTrainer

from orchestra.training.collate import GraphCollator
from orchestra.training.flatten import Row
from orchestra.training.pieces import pieces


class Batches(Protocol):
    """Where batches come from: a function of the step alone."""

    def batch(self, step: int) -> Sequence[Row]:
        """The batch of one optimiser step, over all processes."""


class WeightedSFTTrainer(SFTTrainer):  # type: ignore[misc]  # TRL is untyped to mypy
    """`SFTTrainer` whose batches are rows of `flatten`, and whose loss is weighted by token.

    Args:
        batches: what each of the `args.max_steps` steps is trained on.
        collator: makes tensors of rows.
        args: of TRL. `per_device_train_batch_size` is 1: a process is given its part of a batch as a whole.
        held_out: batches for the evaluation loss.
        marks: tokens, by name, whose accuracy is logged.
        options: of `SFTTrainer`: `model`, `processing_class`, `callbacks`, ...
    """

    def __init__(
        self,
        *,
        batches: Batches,
        collator: GraphCollator,
        args: SFTConfig,
        held_out: Sequence[Sequence[Row]] = (),
        marks: Mapping[str, int] | None = None,
        **options: Any,
    ) -> None:
        self.batches, self.collator, self.held_out, self.marks = batches, collator, held_out, marks or {}
        self.parts = args.gradient_accumulation_steps * args.world_size
        self.tokens_seen = 0
        super().__init__(
            args=args,
            data_collator=self._part,
            train_dataset=Dataset.from_dict({"part": range(args.max_steps * self.parts)}),
            eval_dataset=Dataset.from_dict({"part": [0]}) if held_out else None,
            **options,
        )
        # The weighted mean below is already normalised; Trainer must not divide it by a token count.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _part(self, examples: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """One process's part of a batch in one forward pass, and the weight and number of parts of the whole batch."""
        step, part = divmod(examples[0]["part"], self.parts)
        rows = self.batches.batch(step)
        own = list(rows[part :: self.parts])
        if not own:  # every process takes part in every step
            own = [replace(rows[0], weights=[0.0] * len(rows[0]))]
        return {
            **self._collated(own),
            "total": torch.tensor(weight(rows), dtype=torch.float64),
            "tokens": torch.tensor(sum(map(len, own))),
        }

    def _collated(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Tensors of rows; where rows share sequences, so do their parts that do not see each other."""
        if self.collator.pack is None:
            return self.collator(rows)
        parts = [piece for row in rows for piece in pieces(row)]
        packing = copy(self.collator)
        packing.pack = max(self.collator.pack, *map(len, parts))  # what is longer has a sequence of its own
        return packing(parts)

    def _losses(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Weighted cross-entropies in nats, weights and labels of the places where any row learns, and outputs."""
        seen = {name: inputs[name] for name in ("position_ids", "attention_mask") if name in inputs}
        weights, labels = inputs["loss_weights"][:, 1:], inputs["input_ids"][:, 1:]
        places = (weights != 0).any(0).nonzero().squeeze(1)  # logits of a large vocabulary are most of the memory
        outputs = model(input_ids=inputs["input_ids"], **seen, use_cache=False, logits_to_keep=places)
        logits = outputs.logits.flatten(0, 1)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        weights, labels = weights[:, places], labels[:, places]
        losses = functional.cross_entropy(logits, labels.flatten(), reduction="none")
        return losses.view_as(weights) * weights, weights, labels, outputs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The cross-entropy's mean over the whole batch, weighted by token; accuracies on marks go to the log."""
        losses, weights, labels, outputs = self._losses(model, inputs)
        loss = losses.sum() * (self.parts / inputs["total"])  # the parts' losses are averaged
        with torch.no_grad():
            self.tokens_seen += int(inputs["tokens"])
            learned = weights != 0
            right = outputs.logits.argmax(-1) == labels
            groups = {name: labels == mark for name, mark in self.marks.items()} | {"token": learned}
            for name, chosen in groups.items():
                chosen = chosen & learned
                if bool(chosen.any()):
                    self._metrics["train"][f"{name}_accuracy"].append(float(right[chosen].float().mean()))
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The weighted mean loss of the held-out batches, in nats a token; logged as `eval_loss`."""
        training = self.model.training
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        processes = self.accelerator.num_processes
        with torch.no_grad():
            for first in range(0, len(self.held_out), processes):
                # Where batches run out a process repeats one without counting it: sharded models need all processes.
                index = first + self.accelerator.process_index
                inputs = self._prepare_inputs(self._collated(self.held_out[min(index, len(self.held_out) - 1)]))
                with self.compute_loss_context_manager():
                    losses, weights = self._losses(self.model_wrapped, inputs)[:2]
                if index < len(self.held_out):
                    sums += torch.stack([losses.double().sum(), weights.double().sum()])
        loss, total = self.accelerator.reduce(sums).tolist()
        metrics = {"eval_loss": loss / total}
        self.log(metrics)
        self.model.train(training)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def weight(rows: Sequence[Row]) -> float:
    """The loss weight of all that is learned in some rows."""
    return sum(map(sum, (row.weights for row in rows)))
