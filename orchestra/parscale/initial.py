"""What fresh streams start from when a trained model is recycled."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from orchestra.errors import UsageError
from orchestra.parscale.streams import StreamSet


def fresh_streams(
    model: Any, streams: int, prefix_tokens: int, smoothing: float, seed: int, key_std: float | None = None
) -> StreamSet:
    """Random streams that leave a trained backbone nearly as it is.

    Keys are small, so that every query sees the prefix with about the same score. What attention spends on it is lost
    to the tokens; so the prefix pays out what the model is used to: the values that it computes on random tokens,
    others for each stream. The aggregation network is small, and mixes evenly at first.

    Args:
        model: a causal model of transformers, without streams.
        streams: how many, at least 2.
        prefix_tokens: length of the prefixes.
        smoothing: see `StreamSet`.
        seed: of the random numbers.
        key_std: standard deviation of the keys; None: the configuration's `initializer_range`. With larger ones each
            stream attends to its prefix in its own way from the start, and leaves the backbone further behind.

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

    def normal(*shape: int, std: float = spread) -> torch.Tensor:
        return torch.randn(shape, generator=random) * std

    text = torch.randint(config.vocab_size, (streams, prefix_tokens), generator=random)
    cache = DynamicCache()  # without the configuration: windows would cut it
    with torch.no_grad():
        model(input_ids=text.to(model.device), past_key_values=cache, use_cache=True)
    return StreamSet(
        keys=normal(config.num_hidden_layers, streams, heads, prefix_tokens, dim, std=key_std or spread),
        values=torch.stack([layer.values.float().cpu() for layer in cache.layers]),
        inner=(normal(hidden, hidden * streams), torch.zeros(hidden)),
        outer=(normal(streams, hidden), torch.zeros(streams)),
        smoothing=smoothing,
    )
