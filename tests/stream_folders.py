"""Tiny ParScale checkpoints in the published layout, and the dense forward that they stand for.

The oracle knows nothing of the engine: a plain transformers backbone is run once for each stream, with the prefix in
its own cache, and the last hidden states are mixed by the formula, number by number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from orchestra.runtime.local.model import load_plain

PREFIX, SMOOTHING = 5, 0.1


def write(folder: Path, backbone: str, streams: int, seed: int = 0, whole: bool = True) -> str:
    """A checkpoint with random streams on the model of a folder; without `whole`, its own weights are left out."""
    shutil.copytree(backbone, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"parscale_n": streams, "parscale_n_tokens": PREFIX, "parscale_attn_smooth": SMOOTHING}
    config |= {"model_type": config["model_type"] + "_parscale", "auto_map": {"AutoConfig": "nowhere.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    hidden, draw = config["hidden_size"], torch.Generator().manual_seed(100 * streams + seed)
    tensors = load_file(folder / "model.safetensors") if whole else {}
    prefix = (
        streams,
        config["num_key_value_heads"],
        PREFIX,
        config.get("head_dim") or hidden // config["num_attention_heads"],
    )
    shapes = {
        f"model.layers.{layer}.self_attn.prefix_{part}": prefix
        for layer in range(config["num_hidden_layers"])
        for part in "kv"
    }
    shapes |= {"model.aggregate_layer.0.weight": (hidden, hidden * streams), "model.aggregate_layer.0.bias": (hidden,)}
    shapes |= {"model.aggregate_layer.2.weight": (streams, hidden), "model.aggregate_layer.2.bias": (streams,)}
    tensors |= {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tensors["model.aggregate_layer.0.weight"] *= 0.2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


class Dense:
    """A ParScale checkpoint as a callable like a transformers model; the backbone is that of another folder."""

    def __init__(self, backbone: str, checkpoint: str) -> None:
        self.plain = load_plain(backbone, attention="eager")
        self.tensors = load_file(Path(checkpoint) / "model.safetensors")
        self.streams = len(self.tensors["model.aggregate_layer.2.bias"])
        self.dtype, self.config = self.plain.dtype, self.plain.config

    @torch.inference_mode()
    def __call__(
        self, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> Any:
        """Logits of one row, by a mask `[1, 1, tokens, tokens]` that is added to scores; causal by default."""
        n = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(n)[None]
        if attention_mask is None:
            attention_mask = torch.full((n, n), torch.finfo(self.dtype).min).triu(1)[None, None]
        mask = torch.cat([torch.zeros(1, 1, n, PREFIX), attention_mask], 3)
        hidden = []
        for p in range(self.streams):
            cache = DynamicCache()
            for layer in range(self.config.num_hidden_layers):
                name = f"model.layers.{layer}.self_attn.prefix_"
                cache.update(self.tensors[name + "k"][p : p + 1], self.tensors[name + "v"][p : p + 1], layer)
            out = self.plain.model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=mask, past_key_values=cache
            )
            hidden.append(out.last_hidden_state[0].double())
        return _Out(self.plain.lm_head(self._mix(hidden).to(self.dtype))[None])

    def _mix(self, hidden: list[Tensor]) -> Tensor:
        at = {name: tensor.double() for name, tensor in self.tensors.items() if "aggregate_layer" in name}
        mixed = []
        for t in range(len(hidden[0])):
            # Feature after feature, each with its value in all streams.
            seen = torch.stack([hidden[p][t, h] for h in range(len(hidden[0][t])) for p in range(self.streams)])
            inner = at["model.aggregate_layer.0.weight"] @ seen + at["model.aggregate_layer.0.bias"]
            inner = inner / (1 + (-inner).exp())
            scores = at["model.aggregate_layer.2.weight"] @ inner + at["model.aggregate_layer.2.bias"]
            weights = scores.exp() / scores.exp().sum()
            weights = weights * (1 - SMOOTHING) + SMOOTHING / self.streams
            mixed.append(sum(weights[p] * hidden[p][t] for p in range(self.streams)))
        return torch.stack(mixed)


class _Out:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
