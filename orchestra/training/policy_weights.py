"""The weights of a model in training as an engine takes them: adapters merged, under the names of the plain model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def plain_weights(model: Any, accelerator: Any = None) -> dict[str, Tensor]:
    """The weights that the model computes by. Without adapters nothing is copied where one process holds them.

    Args:
        model: a model of transformers, PEFT's around one, or what accelerate made of it.
        accelerator: gathers weights that are spread over processes; all of them must call this.
    """
    inner = model if accelerator is None else accelerator.unwrap_model(model)
    if hasattr(inner, "merge_adapter"):
        return _merged(inner)
    state = inner.state_dict() if accelerator is None else accelerator.get_state_dict(model)
    return {name: value.detach() for name, value in state.items()}


@torch.no_grad()
def _merged(model: Any) -> dict[str, Tensor]:
    """Copies of a PEFT model's weights with its adapters in them; the model is left as it was, to the last bit."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if ".base_layer." in name}
    model.merge_adapter()
    try:
        found = {}
        for name, parameter in model.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            plain = plain.replace(".modules_to_save.default", "").replace(".token_adapter", "")
            if model.prefix not in plain and ".original_module." not in plain and "trainable_tokens" not in plain:
                found[plain] = parameter.detach().clone()
        return found
    finally:
        model.unmerge_adapter()
        for name, parameter in model.named_parameters():  # subtracting again what was added rounds
            if name in kept:
                parameter.data.copy_(kept[name])
