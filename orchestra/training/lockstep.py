"""Lock-step decoding in a concurrent cache, plain and slow, for probes of small models and as an oracle.

Hogwild! Inference (arXiv:2504.06261). Nothing here is shared with an engine or with the parallel forward: layers are
called one by one, keys are kept in lists without rotation, each reader rotates copies of them to their places in its
view (as the paper's public code does) and takes one softmax over what it sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orchestra.errors import UsageError


class Feed(NamedTuple):
    """One token of one block.

    Attributes:
        tokens: ids, `[batch]`.
        reads: what it sees before its own block, in order: blocks and how many of their tokens, this step's included;
            None for all.
    """

    tokens: Tensor
    reads: Sequence[tuple[str, int | None]] = ()


class LockStep:
    """A batch of runs of one layout. Blocks are named; one comes to be when its first token is fed.

    Args:
        model: a Hugging Face model built like Llama (Qwen3's norms of queries and keys too), float32.
    """

    def __init__(self, model: Any) -> None:
        self._model = model.model
        self._head = model.lm_head
        self._keys: dict[str, list[list[Tensor]]] = {}  # by block: by layer: by token: [batch, key heads, dimensions]
        self._values: dict[str, list[list[Tensor]]] = {}

    def step(self, feeds: Mapping[str, Feed]) -> dict[str, Tensor]:
        """Feed a token to some blocks at the same time; in every layer all are written before any reads.

        Returns:
            By block: logits `[batch, vocabulary]` of what comes next.

        Raises:
            UsageError: a block reads more tokens of another than that has.
        """
        layers = self._model.layers
        hidden = {name: self._model.embed_tokens(feed.tokens) for name, feed in feeds.items()}
        for name in feeds:
            for store in (self._keys, self._values):
                store.setdefault(name, [[] for _ in layers])
        for number, layer in enumerate(layers):
            attention, queries = layer.self_attn, {}
            for name, x in hidden.items():
                normed = layer.input_layernorm(x)
                query, key, value = (
                    part(normed).unflatten(-1, (-1, attention.head_dim))
                    for part in (attention.q_proj, attention.k_proj, attention.v_proj)
                )
                if hasattr(attention, "q_norm"):
                    query, key = attention.q_norm(query), attention.k_norm(key)
                queries[name] = query
                self._keys[name][number].append(key)
                self._values[name][number].append(value)
            for name, feed in feeds.items():
                seen = self._attend(number, name, feed, queries[name], attention.scaling)
                hidden[name] = hidden[name] + attention.o_proj(seen)
                hidden[name] = hidden[name] + layer.mlp(layer.post_attention_layernorm(hidden[name]))
        return {name: self._head(self._model.norm(x)) for name, x in hidden.items()}

    def _attend(self, layer: int, name: str, feed: Feed, query: Tensor, scale: float) -> Tensor:
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for block, length in [*feed.reads, (name, None)]:
            known = self._keys[block][layer]
            length = len(known) if length is None else length
            if length > len(known):
                raise UsageError(f"{name} reads {length} tokens of {block}, which has {len(known)}")
            keys += known[:length]
            values += self._values[block][layer][:length]
        # The place of a key is its number in the view.
        places = torch.arange(len(keys))
        key, value = self._turn(torch.stack(keys, 2), places), torch.stack(values, 2)
        query = self._turn(query.unsqueeze(2), places[-1:])
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        weights = (query @ key.transpose(-1, -2) * scale).softmax(-1)
        return (weights @ value).flatten(1)

    def _turn(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotate `[batch, heads, tokens, dimensions]` to `[tokens]` as the model itself would, its scaling included."""
        cos, sin = self._model.rotary_emb(x, places.unsqueeze(0))
        one, other = x.chunk(2, -1)
        turned: Tensor = x * cos + torch.cat([-other, one], -1) * sin
        return turned
