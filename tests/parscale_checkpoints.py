"""Tiny ParScale checkpoints, written tensor by tensor as the published ones are, and what they must compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 3},
    "llama": {"head_dim": 8},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 8, "sliding_window": 3},
}


def plain(kind: str = "qwen2") -> Any:
    """A random model of this kind with sharp attention, so that what is attended to matters."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SHAPE, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def streams(kind: str, count: int, prefix: int) -> dict[str, Tensor]:
    """Random streams under their published names."""
    random = torch.Generator().manual_seed(count)
    hidden, dim = SHAPE["hidden_size"], KINDS[kind].get("head_dim", 8)
    shapes = {
        f"model.layers.{layer}.self_attn.prefix_{part}": (count, 2, prefix, dim) for layer in range(3) for part in "kv"
    }
    shapes |= {"model.aggregate_layer.0.weight": (hidden, hidden * count), "model.aggregate_layer.0.bias": (hidden,)}
    shapes |= {"model.aggregate_layer.2.weight": (count, hidden), "model.aggregate_layer.2.bias": (count,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write(folder: Path, kind: str = "qwen2", count: int = 3, prefix: int = 5, **changes: Any) -> Path:
    """A checkpoint in the published layout; `changes` of its configuration (None takes a field out)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(plain(kind).state_dict())
    if count > 1:
        tensors |= streams(kind, count, prefix)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    code = {"AutoModelForCausalLM": f"modeling_{kind}_parscale.ParScaleForCausalLM"}
    config = {"model_type": f"{kind}_parscale", "architectures": ["ParScaleForCausalLM"], "auto_map": code}
    config |= {"parscale_n": count, "parscale_n_tokens": prefix, "parscale_attn_smooth": 0.1}
    config |= SHAPE | KINDS[kind] | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard(folder: Path) -> Path:
    """The same checkpoint in three files with an index."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"model-{index % 3 + 1:05}-of-00003.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        held = {name: tensors[name] for name in tensors if place[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


@torch.no_grad()
def expected(kind: str, count: int, prefix: int, ids: list[int], smoothing: float = 0.1) -> Tensor:
    """Logits `[tokens, vocabulary]` by brute force: a plain forward for each stream, with the prefix for its cache and
    the mask written out, and the mixing in numpy as the paper has it."""
    model, tensors, tokens = plain(kind), streams(kind, count, prefix), len(ids)
    window = KINDS[kind].get("sliding_window", tokens)
    seen = torch.tensor([[i - window < j <= i for j in range(tokens)] for i in range(tokens)])
    mask = torch.cat([torch.ones(tokens, prefix, dtype=torch.bool), seen], 1)[None, None]
    hidden = []
    for stream in range(count):
        cache = transformers.DynamicCache()
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn.prefix_"
            cache.update(tensors[f"{name}k"][stream][None], tensors[f"{name}v"][stream][None], layer)
        places = torch.arange(tokens)[None]
        found = model.model(torch.tensor([ids]), attention_mask=mask, position_ids=places, past_key_values=cache)
        hidden.append(found.last_hidden_state[0].double().numpy())
    parts = {
        name.removeprefix("model.aggregate_layer."): tensor.double().numpy()
        for name, tensor in tensors.items()
        if "aggregate" in name
    }
    mixed = []
    for token in range(tokens):
        here = np.stack([stream[token] for stream in hidden])  # [streams, hidden]
        inner = parts["0.weight"] @ here.T.reshape(-1) + parts["0.bias"]  # feature by feature, its streams in turn
        scores = parts["2.weight"] @ (inner / (1 + np.exp(-inner))) + parts["2.bias"]
        weights = np.exp(scores - scores.max())
        weights = weights / weights.sum() * (1 - smoothing) + smoothing / count
        mixed.append(weights @ here)
    logits: Tensor = model.lm_head(torch.tensor(np.array(mixed)).float())
    return logits


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether logits agree to `tolerance` times the larger of 1 and the largest logit."""
    return float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))
