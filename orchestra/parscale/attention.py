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
        attention_mask: which keys are seen, those of the prefix first; none means all.
        **options: what the layer says beside (scale, dropout).
    """
    batch = key.shape[0] // module.prefix_k.shape[0]
    key = torch.cat([module.prefix_k.repeat_interleave(batch, 0), key], 2)
    value = torch.cat([module.prefix_v.repeat_interleave(batch, 0), value], 2)
    options["is_causal"] = False  # the mask says it
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]


def mask(*places: Any, config: Any, **options: Any) -> Tensor:
    """The backbone's own mask of tokens (causal, windows, padding), with the prefix visible before it."""
    # Without a mask the kernel would take the prefix for the first tokens of a causal square.
    options["allow_is_causal_skip"] = False
    return see_prefix(sdpa_mask(*places, config=config, **options), config.parscale_n_tokens)


def see_prefix(seen: Tensor, prefix: int) -> Tensor:
    """A mask `[..., queries, keys]`, boolean or added to scores, with `prefix` visible keys in front."""
    return functional.pad(seen, (prefix, 0), value=1 if seen.dtype == torch.bool else 0)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, mask)
