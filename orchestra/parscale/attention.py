"""Attention in which every token also sees its stream's prefix: an attention function and a mask for transformers.

The prefix is put before the keys where attention is computed, and nowhere else. So caches, positions and masks of the
backbone know of tokens alone, and windows, gradient checkpointing and the kinds of caches work as they do in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "parscale"
"""What transformers knows it by (`attn_implementation`)."""


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention; `module` holds `prefix_k` and `prefix_v`, `[streams, key heads, prefix, dim]`.

    Args:
        module: attention layer of the backbone.
        query: `[streams * batch, heads, tokens, dim]`, streams outer.
        key: of the tokens, `[streams * batch, key heads, tokens, dim]`.
        value: like `key`.
        attention_mask: which tokens are seen, boolean or to be added to scores, `[..., tokens, seen tokens]`; none
            means all. The prefix always is.
        **options: what the layer says beside (scale, dropout).
    """
    batch = key.shape[0] // module.prefix_k.shape[0]
    key = torch.cat([module.prefix_k.repeat_interleave(batch, 0), key], 2)
    value = torch.cat([module.prefix_v.repeat_interleave(batch, 0), value], 2)
    if attention_mask is not None:
        visible = 1 if attention_mask.dtype == torch.bool else 0
        attention_mask = functional.pad(attention_mask, (module.prefix_k.shape[2], 0), value=visible)
    options["is_causal"] = False  # the mask says it
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]  # untyped


def mask(*places: Any, **options: Any) -> Tensor:
    """The backbone's own mask of tokens (causal, windows, padding), always written out.

    Without one, the kernel would take prefix and tokens for one causal square.
    """
    options["allow_is_causal_skip"] = False
    return sdpa_mask(*places, **options)  # type: ignore[no-any-return]  # untyped


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
