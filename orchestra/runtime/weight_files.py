"""A model's weights as a file that a server reads, and what tells them from others."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def digest(weights: Mapping[str, Tensor]) -> str:
    """A name for these weights: a hash of every value."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        found.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def write(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write them as `model.safetensors`. Tensors that are one in memory (a tied head) are written once."""
    from safetensors.torch import save_file

    seen: set[tuple[int, int]] = set()
    chosen: dict[str, Any] = {}
    for name, value in weights.items():
        place = value.data_ptr(), value.numel()
        if place not in seen or not value.numel():
            chosen[name] = value.detach().cpu().contiguous()
        seen.add(place)
    save_file(chosen, folder / "model.safetensors", metadata={"format": "pt"})
