"""`orchestra train grpo`: from a configuration to a trained model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer
from trl import GRPOConfig

from orchestra.errors import UsageError
from orchestra.runtime.engine import Engine
from orchestra.training.arguments import processes, start
from orchestra.training.grpo import GraphGRPOTrainer
from orchestra.training.grpo_config import GRPORun
from orchestra.training.grpo_data import prompts
from orchestra.training.journal import Journal
from orchestra.training.rewards import part
from orchestra.training.rollouts import Arm, Player


def train_grpo(run: GRPORun, *, resume: bool = False, engine: Engine | None = None) -> Path:
    """Train, and write the final model with its tokenizer.

    Args:
        run: what to train.
        resume: go on from the newest whole checkpoint in the output folder.
        engine: plays the rollouts in place of `run.engine`; it is left open.

    Returns:
        The folder of the final model, or of its adapter.

    Raises:
        OrchestraError: the configuration cannot be run, or the engine is gone for good; the checkpoints are there.
    """
    output = Path(run.output)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint = newest_checkpoint(output) if resume else None
    if resume and checkpoint is None:
        raise UsageError(f"nothing to resume: there is no whole checkpoint in {output}")
    asked = prompts(run.task, run.levels, run.items, run.seed)
    if len(asked.items) < run.prompts:
        raise UsageError(f"a generation asks {run.prompts} prompts; {run.task} has {len(asked.items)}")
    arms, rewards = [Arm.of(spec) for spec in run.strategies], [part(spec) for spec in run.rewards]
    player = Player(
        engine or run.engine or f"local:{run.model}?max_batch=384",
        dict(run.engines),
        extract=asked.extract,
        temperature=run.temperature,
        max_tokens=run.max_tokens,
        budget=run.budget,
        concurrency=run.concurrency,
        tries=run.tries,
        patience=run.patience,
    )
    try:
        player.open()
        trainer = GraphGRPOTrainer(
            player=player,
            prompts=asked,
            arms=arms,
            rewards=rewards,
            scale=run.advantage,
            mean=run.mean,
            sampler_cap=run.sampler_cap,
            protocol=run.protocol,
            model=run.model,
            args=arguments(run),
            processing_class=AutoTokenizer.from_pretrained(run.model),
            callbacks=[Journal(output)],
            peft_config=_adapter(run),
        )
        if trainer.is_world_process_zero():
            start(run)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return _save(trainer, output / "final")
    finally:
        player.close()


def arguments(run: GRPORun) -> GRPOConfig:
    """TRL's arguments of a run.

    Raises:
        UsageError: rollouts cannot be divided as asked for.
    """
    count = processes().num_processes
    if run.prompts % count:
        raise UsageError(f"prompts={run.prompts} are no multiple of the {count} processes")
    local = run.prompts // count * run.group
    if local % run.minibatches:
        raise UsageError(f"{local} rollouts of a process cannot be split into {run.minibatches} minibatches")
    rows = max(size for size in range(1, run.rows + 1) if local // run.minibatches % size == 0)
    accumulate = local // run.minibatches // rows
    return GRPOConfig(
        output_dir=run.output,
        seed=run.seed,
        max_steps=run.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        steps_per_generation=accumulate * run.minibatches,
        num_generations=run.group,
        num_iterations=run.epochs,
        learning_rate=run.learning_rate,
        lr_scheduler_type=run.schedule,
        warmup_steps=run.warmup_steps,
        weight_decay=run.weight_decay,
        adam_beta2=run.beta2,
        max_grad_norm=run.max_grad_norm,
        epsilon=run.clip_low,
        epsilon_high=run.clip_high,
        beta=run.kl,
        temperature=run.temperature,
        logging_steps=run.log_every,
        save_steps=-(-run.save_every // run.turn) * run.turn,
        save_total_limit=2,
        bf16=run.bf16,
        gradient_checkpointing=run.gradient_checkpointing,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=run.report_to,
        model_init_kwargs={"dtype": "bfloat16" if run.bf16 and run.lora else "float32"},
        disable_tqdm=True,
        disable_dropout=True,  # rollouts are played without
        dataloader_num_workers=0,
    )


def _adapter(run: GRPORun) -> Any:
    if run.lora is None:
        return None
    from orchestra.extras import require

    require("peft", what="training adapters", extra="train")
    from peft import LoraConfig

    try:
        return LoraConfig(task_type="CAUSAL_LM", **run.lora)
    except TypeError as error:
        raise UsageError(f"lora: {error}") from error


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end: the trainer's state is written last."""
    found = []
    for folder in output.glob("checkpoint-*"):
        try:
            found.append((int(json.loads((folder / "trainer_state.json").read_text())["global_step"]), folder))
        except (OSError, ValueError, KeyError):
            continue
    return max(found)[1] if found else None


def _save(trainer: GraphGRPOTrainer, final: Path) -> Path:
    """Write the model beside where it belongs, and move it there: what has that name is whole."""
    trainer.model.config.use_cache = True  # Trainer switches it off
    beside = final.with_name(final.name + ".partial")
    trainer.save_model(str(beside))
    if trainer.is_world_process_zero():
        shutil.rmtree(final, ignore_errors=True)
        beside.replace(final)
    trainer.accelerator.wait_for_everyone()
    return final
