"""Attention over one set of keys, with the log-sum-exp that lets parts be merged (Hydragen, arXiv:2402.05099).

Two kernels behind one function: `reference` (matrix products in float32, any device: the oracle) and `auto` (the
fastest one that the device has). Both give the same numbers within float32 rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["reference", "auto"]
KERNELS: tuple[Kernel, ...] = ("reference", "auto")


FEW_QUERIES = 8
"""Up to so many queries per head two batched products beat the CPU flash kernel (by 10 to 20 % for one query and 200
keys); above it, flash's blocking pays."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    kernel: Kernel = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log of its normaliser.

    Every query must see at least one key: the CPU flash kernel gives a wrong log-sum-exp for a fully masked row.

    Args:
        query: `[batch, heads, queries, dim]`, last dimension contiguous.
        key: `[batch, key heads, keys, dim]`; query head h reads key head `h // (heads // key heads)`.
        value: like `key`.
        scale: factor on the scores.
        mask: added to the scores; broadcasts to `[batch, heads, queries, keys]`.
        causal: query i sees keys 0..i (as many keys as queries).
        softcap: c of `c * tanh(scores / c)`, before the mask; None for none.
        kernel: `reference` or `auto`.

    Returns:
        The output `[batch, heads, queries, dim]` and the natural-log normaliser `[batch, heads, queries]` in float32.
        With no keys at all: zeros and minus infinity, the neutral element of `merge`.
    """
    if key.shape[2] == 0:  # the CPU kernel divides by zero here and takes the process with it
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if kernel == "auto" and query.device.type == "cpu" and softcap is None:
        few = query.shape[2] <= FEW_QUERIES and query.shape[1] == key.shape[1]
        if few and not causal and query.dtype == torch.float32:
            return _products(query, key, value, scale, mask)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        return out, lse
    return _reference(query, key, value, scale, mask, causal, softcap)


def _products(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_reference` for equal head counts and float32, with as few passes over the scores as possible."""
    batch, heads, queries, dim = query.shape
    keys = key.shape[2]
    flat = (batch * heads, -1, dim)
    scores = torch.bmm((query * scale).reshape(flat), key.reshape(flat).transpose(1, 2)).view(
        batch, heads, queries, keys
    )
    if mask is not None:
        scores += mask
    top = scores.amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights.view(batch * heads, queries, keys), value.reshape(flat)).view(batch, heads, queries, dim)
    return out.div_(total), (top + total.log()).squeeze(-1)


def _reference(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool, softcap: float | None
) -> tuple[Tensor, Tensor]:
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


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each.

    Args:
        out_a: output over the first set, `[..., dim]`, any float type.
        lse_a: its normaliser, `[...]`; minus infinity for an empty set.
        out_b: output over the second set.
        lse_b: its normaliser.

    Returns:
        Output and normaliser in float32.
    """
    top = torch.maximum(lse_a, lse_b)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)  # both empty: weights 0, not nan
    weight_a, weight_b = (lse_a - top).exp(), (lse_b - top).exp()
    total = weight_a + weight_b
    out = torch.addcmul(out_a * weight_a.unsqueeze(-1), out_b.float(), weight_b.unsqueeze(-1))
    return out / total.clamp_min(1e-38).unsqueeze(-1), top + total.log()
