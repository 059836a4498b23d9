"""What fresh streams start from when a trained model is recycled."""

from __future__ import annotations

from typing import Any

import torch

from orchestra.errors import UsageError
from orchestra.parscale.streams import StreamSet


def fresh_streams(model: Any, streams: int, prefix_tokens: int, smoothing: float, seed: int) -> StreamSet:
    """Random streams that fit a backbone.

    Args:
        model: a causal model of transformers.
        streams: how many, at least 2.
        prefix_tokens: length of the prefixes.
        smoothing: see `StreamSet`.
        seed: of the random numbers.

    Raises:
        UsageError: a count is too small, or the smoothing is no share.
    """
    if streams < 2 or prefix_tokens < 1:
        raise UsageError(f"needs at least 2 streams and 1 prefix token, not {streams} and {prefix_tokens}")
    if not 0 <= smoothing <= 1:
        raise UsageError(f"smoothing is a share from 0 to 1, not {smoothing:g}")
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden: int = config.hidden_size
    spread: float = config.initializer_range
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) * spread

    shape = (config.num_hidden_layers, streams, heads, prefix_tokens, dim)
    return StreamSet(
        keys=normal(*shape),
        values=normal(*shape),
        inner=(normal(hidden, hidden * streams), torch.zeros(hidden)),
        outer=(normal(streams, hidden), torch.zeros(streams)),
        smoothing=smoothing,
    )
