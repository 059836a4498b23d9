"""Low-rank adapters in training: put on, and written so that `local:` and others load them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestra.extras import require
from orchestra.training.sft_config import Lora
from orchestra.training.vocabulary import token_tables


def adapt(model: Any, lora: Lora, new: Sequence[int]) -> Any:
    """The model with an adapter on it; only that is trained, and the rows of new tokens.

    Args:
        model: a causal model of transformers; changed.
        lora: what adapters.
        new: ids whose rows of the embedding, and of an output head of its own, are trained in full.

    Raises:
        MissingExtraError: there is no peft.
    """
    require("peft", what="LoRA", extra="train")
    import peft

    tables = token_tables(model)
    names = [name for name, module in model.named_modules() if any(module is table for table in tables)]
    rows = {name.rpartition(".")[2]: list(new) for name in names}
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.targets,
            modules_to_save=lora.full or None,
            trainable_token_indices=rows if new else None,
            task_type="CAUSAL_LM",
        ),
    )


def save(model: Any, folder: Path, *, merged: bool) -> None:
    """Write an adapter, or the model with it merged.

    The adapter holds the rows of new tokens and not the whole embedding, so that it fits its model whatever that one's
    vocabulary was filled up to; who loads it makes room for the tokens of the tokenizer beside it.
    """
    if merged:
        model.merge_and_unload().save_pretrained(folder)
    else:
        model.save_pretrained(folder, save_embedding_layers=False)
