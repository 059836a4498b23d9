"""Attention over one set of keys, with the log-sum-exp that lets parts be merged (Hydragen, arXiv:2402.05099).

Two kernels behind one function: `reference` (matrix products in float32, any device: the oracle) and `auto` (the
fastest one that the device has). Both give the same numbers within rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from orchestra.runtime.attention import cpu, cuda, reference

Kernel = Literal["reference", "auto"]
KERNELS: tuple[Kernel, ...] = ("reference", "auto")


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
        With no keys at all: zeros and minus infinity: a part of weight zero.
    """
    if key.shape[2] == 0:  # the CPU kernel divides by zero here and takes the process with it
        return torch.zeros_like(query), query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
    if kernel == "auto" and softcap is None:
        if query.device.type == "cpu":
            return cpu.attend(query, key, value, scale, mask, causal)
        if query.device.type == "cuda":
            return cuda.attend(query, key, value, scale, mask, causal)
    return reference.attend(query, key, value, scale, mask, causal, softcap)
