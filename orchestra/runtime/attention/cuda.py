"""The CUDA kernels: those of PyTorch that give the log of the normaliser beside the output.

Half types without a mask go to flash attention (which splits long keys over the whole card), masks and float32 to the
memory-efficient kernel. Both are used only after they have given the reference's numbers on this device
for a small random problem; where they do not, the reference is used and a warning says so.

FlashInfer is not used: its log-sum-exp is of base 2, and its cascade wants a paged layout that segments do not have.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from orchestra.runtime.attention import reference

_ALIGNED = 8  # the kernels load vectors of so many numbers: rows of keys and of masks begin at multiples of it
_LARGEST_DIM = 256
_NEVER = -1e30
"""Stands for minus infinity in masks: a block of keys that a row does not see at all then has a finite maximum, and its
weight is zero after the block that the row does see."""

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference from the reference that the probe lets pass (float32 may use TF32)."""


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """See `kernels.attend`."""
    dim = query.shape[3]
    if dim % _ALIGNED or dim > _LARGEST_DIM or not trusted(query.device, query.dtype):
        return reference.attend(query, key, value, scale, mask, causal)
    return fused(query, key, value, scale, mask, causal)


def fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention by a library kernel; the head dimension is a multiple of 8 and at most 256."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if heads != key.shape[1]:  # chunks only: all other reads have folded the heads that share a key head into queries
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if mask is None and query.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        return out, lse
    if mask is not None:
        mask = pad(mask.clamp_min(_NEVER).to(query.dtype), (0, -keys % _ALIGNED))[..., :keys]
        mask = mask.expand(batch, heads, queries, keys)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, causal, scale=scale
    )
    return out, lse[:, :, :queries]  # which is padded to a multiple of 32


@cache
def trusted(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give the reference's numbers on this device; tried once, the first time they are wanted."""
    try:
        worst = deviation(device, dtype)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
    else:
        if worst <= TOLERANCE[dtype]:
            return True
        reason = f"they are off by {worst:.1e}"
    warnings.warn(
        f"attention on {device} in {dtype} runs on the slow reference: PyTorch's kernels cannot be used ({reason})",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def deviation(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference between `fused` and the reference, in outputs and normalisers, over all ways it is called.

    Raises:
        RuntimeError: a kernel does not run on this device.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype)

    query, arena = normal(3, 4, 5, 64), normal(2, 3, 2, 256, 64)
    key, value = arena[0, :, :, :203], arena[1, :, :, :203]  # slots of an arena, as long as the longest
    columns = torch.arange(203, device=device)
    used = torch.tensor([203, 1, 77], device=device).view(3, 1, 1, 1)
    tails = torch.zeros(3, 1, 1, 203, device=device).masked_fill_(columns >= used, -torch.inf)
    window = torch.zeros(5, 203, device=device)
    window.masked_fill_(columns < 40 * torch.arange(5, device=device).unsqueeze(1), -torch.inf)
    cases: list[tuple[Tensor, Tensor, Tensor, Tensor | None, bool]] = [
        (query[:, :2], key, value, None, False),
        (query[:, :2], key, value, tails, False),
        (query[:, :2, :1], key, value, tails, False),
        (query, key, value, window, False),
        (query, key[:, :, :5], value[:, :, :5], None, True),
        (query[:, :, :1], key[:, :, :1], value[:, :, :1], None, True),
    ]
    worst = 0.0
    for q, k, v, mask, causal in cases:
        pairs = zip(fused(q, k, v, 0.2, mask, causal), reference.attend(q, k, v, 0.2, mask, causal), strict=True)
        for ours, right in pairs:
            off = float((ours.float() - right.float()).abs().max()) if ours.shape == right.shape else torch.inf
            worst = max(worst, off if off == off else torch.inf)  # nan is not small
    return worst
