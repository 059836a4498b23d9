"""PEFT adapters: merged into the weights when the model is loaded, so that running them costs nothing."""

from __future__ import annotations

from typing import Any

from orchestra.errors import UsageError
from orchestra.extras import require
from orchestra.runtime.local.sources import read


def merge_adapter(module: Any, adapter: str, vocabulary: int) -> Any:
    """A model with an adapter's change added to its weights, in their type.

    Args:
        module: the base model.
        adapter: folder of the adapter.
        vocabulary: of the tokenizer; the embeddings grow to it, as they did when tokens were added in training.

    Returns:
        The base model itself, changed; no layer of the adapter is left in it.

    Raises:
        MissingExtraError: peft is not installed.
        UsageError: the adapter does not fit the model, or is of a kind that cannot be merged (prompt or prefix tuning).
    """
    require("peft", what="an adapter", extra="train")
    import peft

    if vocabulary > module.get_input_embeddings().weight.shape[0]:
        module.resize_token_embeddings(vocabulary, mean_resizing=False)
    config = read(lambda: peft.PeftConfig.from_pretrained(adapter), adapter)
    if config.is_prompt_learning:
        raise UsageError(f"the adapter {adapter} is {config.peft_type.value}: it is no change of weights to merge")
    tuned = read(lambda: peft.PeftModel.from_pretrained(module, adapter, config=config), adapter)
    if not hasattr(tuned.base_model, "merge_and_unload"):
        raise UsageError(f"the adapter {adapter} is {config.peft_type.value}, which peft cannot merge into weights")
    return read(tuned.merge_and_unload, adapter)
