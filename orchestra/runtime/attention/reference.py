"""The oracle of all kernels: attention and its normaliser by matrix products in float32, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend`."""
    batch, heads, queries, dim = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    grouped = query.float().reshape(batch, key_heads, heads // key_heads, queries, dim)
    scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2) * scale
    scores = scores.reshape(batch, heads, queries, keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if causal:
        future = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().reshape(batch, key_heads, heads // key_heads, queries, keys)
    out = (weights @ value.float().unsqueeze(2)).reshape(batch, heads, queries, dim)
    return out.to(query.dtype), lse
