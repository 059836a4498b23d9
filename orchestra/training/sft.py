"""Supervised training on demonstrations: `orchestra train sft CONFIG.yaml [key=value ...] [--resume]`.

Texts with tags, rows that were made before, or Countdown generated on the fly; a model from a folder, an id, or
untrained; all of it or an adapter. docs/sft.md leads a user through.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig

from orchestra.errors import UsageError
from orchestra.runtime.local.sources import load_tokenizer, local_folder, read, tokenizer_at
from orchestra.training import lora, text_tokenizer
from orchestra.training import tokenizer as words
from orchestra.training.arguments import arguments, processes, start
from orchestra.training.collate import GraphCollator
from orchestra.training.journal import Journal
from orchestra.training.mixture import HIT, MISS
from orchestra.training.multilingual import grow, tell_openings
from orchestra.training.sft_config import SupervisedConfig, load_config
from orchestra.training.sft_data import Data, load_data
from orchestra.training.trainer import WeightedSFTTrainer
from orchestra.training.vocabulary import add_tags, default_tags, tags_of

__all__ = [
    "Data",
    "SupervisedConfig",
    "build_model",
    "build_tokenizer",
    "load_config",
    "load_data",
    "train",
    "train_sft",
]

MARKS = {"hit": HIT, "miss": MISS}


def build_tokenizer(config: SupervisedConfig) -> Any:
    """The tokenizer of a run, before tags are added."""
    context = config.model.get("max_position_embeddings", 4096) if isinstance(config.model, dict) else 4096
    if config.tokenizer == "countdown":
        return words.build(context)
    if config.tokenizer == "multilingual":
        return words.multilingual(context)
    if config.tokenizer == "text":
        return text_tokenizer.build(context, words=(), tags=())
    if config.tokenizer:
        return tokenizer_at(config.tokenizer)
    if not isinstance(config.model, str):
        raise UsageError("an untrained model needs a tokenizer: a folder, an id, countdown or text")
    if config.revision is None:
        return load_tokenizer(config.model)
    model, revision = config.model, config.revision
    return read(lambda: AutoTokenizer.from_pretrained(model, revision=revision), model)


def build_model(config: SupervisedConfig, tokenizer: Any) -> Any:
    """The model of a run, before tags are added; the weights of an untrained one are fixed by the seed.

    Raises:
        UsageError: there is no such model.
    """
    options = {"dtype": getattr(torch, config.dtype), "attn_implementation": config.attention}
    if isinstance(config.model, str):
        if not config.model:
            raise UsageError("model: is missing: a folder or Hugging Face id, or the keys of an untrained one")
        place, local = config.model, local_folder(config.model)
        options |= {"revision": config.revision, "local_files_only": local}
        return read(lambda: AutoModelForCausalLM.from_pretrained(place, **options), place)
    keys: dict[str, Any] = {"vocab_size": len(tokenizer)}
    keys |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    keys |= config.model
    if "model_type" not in keys:
        raise UsageError("model: an untrained model needs its model_type, such as llama")
    torch.manual_seed(config.seed)
    return read(lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(**keys), **options), keys["model_type"])


class ProbeJournal(Journal):
    """A journal of log lines and of probes of Countdown."""

    def __init__(self, config: SupervisedConfig) -> None:
        super().__init__(config.output)
        self.config = config

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Probe the model now and then."""
        every, mixture = self.config.probe_every, self.config.mixture
        if every and mixture and state.global_step % every == 0 and state.is_world_process_zero:
            from orchestra.training.probe import probe

            for level in mixture["levels"]:
                # A model that has not learned to stop would run to the end of the context.
                report = probe(kwargs["model"], level, "dev", self.config.probe_items, mode="spawn_join", longest=448)
                self.write(state.global_step, {"probe": asdict(report)})


SCHEDULES: dict[str, dict[str, Any]] = {
    "wsd": {},
    **{name: {"lr_scheduler_type": name, "lr_scheduler_kwargs": {}} for name in ("cosine", "linear")},
    "constant": {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {}},
}


def options(config: SupervisedConfig, steps: int, **more: Any) -> SFTConfig:
    """What a run says to TRL.

    Raises:
        UsageError: arguments that do not exist or do not go together; several GPUs in one process, where a batch would
            be torn apart.
    """
    if config.warmup_share:
        config = replace(config, warmup_steps=math.ceil(config.warmup_share * steps))
    told = (
        arguments(config, steps)
        | SCHEDULES[config.schedule]
        | {
            "adam_beta1": config.beta1,
            "adam_beta2": config.beta2,
            "max_grad_norm": config.max_grad_norm,
            "gradient_accumulation_steps": config.accumulate,
            "logging_steps": config.log_every,
            "bf16": config.bf16,
            "gradient_checkpointing": config.gradient_checkpointing,
            "report_to": config.report_to,
            "ddp_find_unused_parameters": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "dataloader_num_workers": 0,
            **more,
        }
    )
    try:
        made = SFTConfig(**told | config.trainer)
    except (TypeError, ValueError) as error:
        raise UsageError(f"trainer: {error}") from error
    if made.use_cpu and config.attention == "flex_attention":
        raise UsageError("attention: flex_attention learns on a GPU only; sdpa takes the same rows (attention=sdpa)")
    if made.n_gpu > 1:
        raise UsageError(
            f"{made.n_gpu} GPUs: start with `accelerate launch -m orchestra train sft ...`, or show it one"
        )
    return made


def train(
    config: SupervisedConfig,
    model: Any,
    tokenizer: Any,
    data: Data,
    *,
    marks: Mapping[str, int] | None = None,
    journal: Journal | None = None,
    resume: bool = False,
    new: Sequence[int] = (),
) -> Path:
    """Train a model on batches of rows, and write it with its tokenizer.

    Args:
        config: of the run; its model and data are those given here.
        model: a causal model of transformers.
        tokenizer: its tokenizer.
        data: batches, steps and held-out batches.
        marks: tokens, by name, whose accuracy is logged.
        journal: writes the log.
        resume: go on from the newest checkpoint in the output folder.
        new: ids whose rows are trained in full beside an adapter.

    Returns:
        The folder of the final model, or of its adapter.
    """
    state = processes()
    output = start(config) if state.is_main_process else Path(config.output)
    evaluates = {"eval_strategy": "steps", "eval_steps": config.evaluate_every or data.steps} if data.held_out else {}
    told = options(config, data.steps, **evaluates)
    if config.lora is not None:
        torch.manual_seed(config.seed)
        model = lora.adapt(model, config.lora, new)
    journal = journal or Journal(output)
    trainer = WeightedSFTTrainer(
        batches=data.batches,
        held_out=data.held_out,
        collator=GraphCollator(_pad(tokenizer), config=model.config, pack=config.packing or None, dtype=model.dtype),
        marks=marks,
        model=model,
        args=told,
        processing_class=tokenizer,
        callbacks=[journal],
    )
    journal.trainer = trainer
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if sharded and config.lora is not None and config.export == "merged":
        raise UsageError("export: merged needs the whole model in one place; export the adapter of a sharded run")
    trainer.train(resume_from_checkpoint=resume)
    final = output / "final"
    trainer.model.config.use_cache = True  # Trainer switches it off
    if config.lora is None or sharded:
        trainer.save_model(str(final))
    elif state.is_main_process:
        lora.save(trainer.accelerator.unwrap_model(trainer.model), final, merged=config.export == "merged")
        tokenizer.save_pretrained(final)
    return final


def _pad(tokenizer: Any) -> int:
    """An id for places where nothing stands: nobody reads it."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def train_sft(config: SupervisedConfig, *, resume: bool = False) -> Path:
    """Train, and write the final model with its tokenizer.

    Args:
        config: What to train.
        resume: Continue from the newest checkpoint in the output folder.

    Returns:
        The folder of the final model, or of its adapter.

    Raises:
        UsageError: model, data or numbers do not go together.
    """
    if config.lora is not None and config.export == "adapter" and not isinstance(config.model, str):
        raise UsageError("an adapter belongs to a model: a folder or an id (or export: merged)")
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer)
    if config.tokenizer == "multilingual":
        grow(model, config.seed)
    tags = tags_of(config.tags) if config.tags is not None else default_tags(config.language)
    new = add_tags(model, tokenizer, tags, config.pad_vocabulary)
    data = load_data(config, tokenizer, config.accumulate * processes().num_processes)
    generated = config.mixture is not None
    final = train(
        config,
        model,
        tokenizer,
        data,
        marks=MARKS if generated else None,
        journal=ProbeJournal(config) if generated else None,
        resume=resume,
        new=new,
    )
    if config.mixture is not None and "languages" in config.mixture:
        tell_openings(final)
    return final
