"""What `orchestra train sft` is told: the keys of its YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict

from orchestra.training.config import read_config


@dataclass(frozen=True)
class Source:
    """Demonstrations to learn from.

    Attributes:
        path: JSONL or parquet file of texts, a folder written by `datasets` (of texts, or of rows as
            `orchestra data make` writes them), or a Hugging Face data set id.
        share: Part of an epoch's rows that come from here, relative to the other sources; default: as many as it has.
        split: Of a data set with several.
        revision: Commit of a Hugging Face data set.
        language: Of the texts that do not say themselves; default: that of the run.
        texts: Of a data set with texts and rows: whether rows are made anew of its texts. Ready ones are in the tokens
            of the model that they were made for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    path: str
    share: float | None = None
    split: str = "train"
    revision: str | None = None
    language: str | None = None
    texts: bool = False


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA) instead of the whole model; the rows of new tokens are trained in full.

    Attributes:
        r: Rank.
        alpha: The adapters' product is scaled by `alpha / r`.
        dropout: Before the adapters.
        targets: Names of the linear layers that get one.
        full: Modules that are trained in full beside them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    full: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SupervisedConfig:
    """A supervised training run; every field may stand in the YAML file or as ``key=value`` on the command line.

    Attributes:
        output: Folder of checkpoints, log and final model.
        seed: Fixes fresh weights, and the batches with their order.
        model: Folder or Hugging Face id of a causal model, or the configuration of an untrained one (`model_type` and
            its keys in transformers).
        revision: Commit of a Hugging Face model.
        dtype: Of the weights; see `bf16`.
        attention: Implementation of transformers: `sdpa`, `eager` or `flex_attention`.
        tokenizer: Folder or id, if not the model's; of an untrained model also `countdown`, the words of the embedded
            model, or `text`, a token a character.
        tags: Tokens to add: tags, or names of languages for all of theirs; default: those of `language` if it is one of
            parallel blocks.
        pad_vocabulary: The vocabulary is filled up to a multiple of this; 0: it is not.
        data: A path (see `Source`), or several sources with their shares.
        mixture: Countdown demonstrations generated on the fly instead, in the words of the embedded model: arguments of
            `Mixture` (`tokens`: a batch's, and so on); with `languages`, those of `Languages`, in all languages of the
            multilingual model, whose tokenizer is `multilingual`.
        language: Of texts that do not say themselves: a language of `orchestra.protocols`, or `plain`.
        layout: How texts become rows: the thread `graph` with what the orchestrator forces unlearned, or the `trie` of
            contexts and completions with the whole text as one of them (ThreadWeaver, arXiv 2512.07843).
        join: How paths of texts come back, as in the strategies: `reuse`, `recompute` (what servers without reuse joins
            compute), or `auto`: as the language was published.
        parallel: Share of the rows in their parallel rendering at the first and at the last step, linear in between;
            the others are plain text, without tags (Multiverse, arXiv 2506.09991, goes from 0 to 1).
        suffixes: Appended to the last user message (or prompt) of a row that is rendered `parallel` or `plain`.
        weights: Loss weights of tokens, by their text; 1 for what is not named.
        longest: Rows with more tokens are left out.
        shuffle: Whether each epoch has an order of its own.
        held_out: Rows for the evaluation loss, taken out of the data.
        evaluate_every: Steps between evaluations; 0 for one at the end.
        steps: Optimiser steps, one batch each.
        epochs: Instead of `steps`: how often each row is seen.
        batch: Rows of a step, over all processes.
        accumulate: Forward passes that a process makes a step.
        packing: Tokens of a sequence that several rows share; 0: each row is a sequence.
        learning_rate: Peak learning rate.
        schedule: After warm-up: `constant`, then falling to zero over the last `decay_share` of the steps (`wsd`);
            `cosine`; `linear`; `constant`.
        warmup_steps: Steps of linear warm-up.
        warmup_share: Instead of `warmup_steps`: share of all steps.
        decay_share: Of `wsd`.
        beta1: AdamW's first beta.
        beta2: AdamW's second beta.
        weight_decay: AdamW's weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
        lora: Adapters instead of the whole model.
        export: With adapters, what the final folder holds: the `adapter`, or the model with it `merged`.
        bf16: Compute in bfloat16.
        gradient_checkpointing: Save memory by computing activations twice.
        report_to: Where transformers reports besides `log.jsonl`: `wandb`, `tensorboard`, ...
        log_every: Steps between log lines.
        save_every: Steps between checkpoints that a run can resume from.
        probe_every: Of a Countdown mixture: steps between probes on the dev split; 0 for none.
        probe_items: Instances of a probe per level.
        trainer: Further arguments of TRL's `SFTConfig` (`fsdp`, `deepspeed`, ...).
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    output: str = "runs/sft"
    seed: int = 1
    model: str | dict[str, Any] = ""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str = "sdpa"
    tokenizer: str = ""
    tags: list[str] | None = None
    pad_vocabulary: int = 0
    data: str | list[Source] = ""
    mixture: dict[str, Any] | None = None
    language: str = "plain"
    layout: Literal["graph", "trie"] = "graph"
    join: Literal["auto", "reuse", "recompute"] = "auto"
    parallel: tuple[float, float] = (1.0, 1.0)
    suffixes: dict[Literal["parallel", "plain"], str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    longest: int = 4096
    shuffle: bool = True
    held_out: int = 0
    evaluate_every: int = 0
    steps: int | None = None
    epochs: float | None = None
    batch: int = 16
    accumulate: int = 1
    packing: int = 0
    learning_rate: float = 1e-5
    schedule: Literal["wsd", "cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    warmup_share: float = 0.0
    decay_share: float = 0.4
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora: Lora | None = None
    export: Literal["adapter", "merged"] = "adapter"
    bf16: bool = False
    gradient_checkpointing: bool = False
    report_to: list[str] = field(default_factory=list)
    log_every: int = 10
    save_every: int = 500
    probe_every: int = 0
    probe_items: int = 32
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def sources(self) -> list[Source]:
        """The sources of `data`."""
        if isinstance(self.data, str):
            return [Source(self.data)] if self.data else []
        return self.data


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> SupervisedConfig:
    """The configuration of a supervised run; see `read_config`."""
    return read_config(SupervisedConfig, path, overrides)
