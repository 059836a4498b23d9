"""Which packed queries read which keys: made once per step, used by every layer.

A step packs tokens of many threads into one row of `rows` queries. Their own keys are written first; then each set of
keys is read once for all its readers, and the parts are merged by log-sum-exp. Nothing here knows an engine: keys and
values are tensors, rows are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestra.runtime.attention.kernels import Kernel, attend, merge


@dataclass(slots=True, eq=False)
class Write:
    """New keys and values of the rows `start..stop`, to be copied to a stretch of a segment.

    Attributes:
        start, stop: the rows.
        keys, values: where to, `[layers, key heads, stop - start, dim]`.
    """

    start: int
    stop: int
    keys: Tensor
    values: Tensor


@dataclass(slots=True, eq=False)
class Shared:
    """One segment that any number of rows reads in full: matrix-matrix instead of matrix-vector.

    Attributes:
        rows: the readers, int64.
        keys, values: `[layers, key heads, tokens, dim]`.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor


@dataclass(slots=True, eq=False)
class Chunk:
    """Consecutive new tokens of one node reading that node, themselves included.

    Attributes:
        start, stop: the rows; they are the last `stop - start` of the keys.
        keys, values: `[layers, key heads, tokens, dim]`.
        mask: `[stop - start, tokens]`, added to the scores; None when the rows are all the keys (plain causal).
    """

    start: int
    stop: int
    keys: Tensor
    values: Tensor
    mask: Tensor | None

    @classmethod
    def over(cls, start: int, stop: int, keys: Tensor, values: Tensor) -> Chunk:
        """The chunk with its mask."""
        rows, tokens = stop - start, keys.shape[2]
        mask = None
        if tokens > rows:
            mask = torch.full((rows, tokens), -torch.inf, device=keys.device).triu(tokens - rows + 1)
        return cls(start, stop, keys, values, mask)


@dataclass(slots=True, eq=False)
class Tails:
    """One new token for each slot of a padded arena: row `start + i` is the last token of slot i.

    Attributes:
        start: the first row.
        keys, values: the whole arena, `[layers, slots, key heads, capacity, dim]`.
        used: tokens in each slot, the new one included, int64 `[slots in use]`.
        longest: the maximum of `used`.
        mask: `[slots in use, 1, 1, longest]`, added to the scores.
        index: where the new tokens go in `[slots * key heads * capacity]`, `[slots in use * key heads]`.
    """

    start: int
    keys: Tensor
    values: Tensor
    used: Tensor
    longest: int
    mask: Tensor
    index: Tensor

    @classmethod
    def over(cls, start: int, keys: Tensor, values: Tensor, used: Tensor, longest: int) -> Tails:
        """The tails with their mask and index."""
        _, _, heads, capacity, _ = keys.shape
        device = keys.device
        mask = torch.zeros(len(used), longest, device=device)
        mask.masked_fill_(torch.arange(longest, device=device) >= used.unsqueeze(1), -torch.inf)
        lines = torch.arange(len(used) * heads, device=device).view(-1, heads) * capacity
        index = (lines + (used - 1).unsqueeze(1)).view(-1)
        return cls(start, keys, values, used, longest, mask.view(len(used), 1, 1, longest), index)

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + len(self.used)


@dataclass(slots=True, eq=False)
class Plan:
    """All writes and reads of a step. Every row has at most one own read (`tails` or `chunks`), any number of shared.

    Attributes:
        rows: number of packed tokens.
        tails, chunks, writes, shared: see their classes.
        kernel: which attention kernel to use.
        layers_run: how often `run` was called; an engine checks that it was once a layer.
    """

    rows: int
    tails: list[Tails] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    kernel: Kernel = "auto"
    layers_run: int = 0

    def run(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Write the new keys and values of one layer, then attend.

        Args:
            layer: index of the layer.
            query: `[rows, heads, dim]`, rotated.
            key: `[rows, key heads, dim]`, rotated.
            value: like `key`.
            scale: factor on the scores.

        Returns:
            `[rows, heads, dim]` in the type of `query`.
        """
        self.layers_run += 1
        self._write(layer, key, value)
        rows, heads, dim = query.shape
        groups = heads // key.shape[1]
        merging = bool(self.shared)
        out = torch.empty(rows, heads, dim, dtype=torch.float32 if merging else query.dtype, device=query.device)
        lse = torch.full((rows, heads), -torch.inf, device=query.device) if merging else None
        if merging:
            out.zero_()  # rows without an own read (echoes) begin as the empty set
        for tail in self.tails:
            a, b, n = tail.start, tail.stop, tail.longest
            slots = b - a
            part, weight = attend(
                query[a:b].reshape(slots, -1, groups, dim),
                tail.keys[layer, :slots, :, :n],
                tail.values[layer, :slots, :, :n],
                scale,
                mask=tail.mask,
                kernel=self.kernel,
            )
            out[a:b] = part.reshape(slots, heads, dim)
            if lse is not None:
                lse[a:b] = weight.reshape(slots, heads)
        for chunk in self.chunks:
            a, b = chunk.start, chunk.stop
            part, weight = attend(
                query[a:b].transpose(0, 1).unsqueeze(0),
                chunk.keys[layer].unsqueeze(0),
                chunk.values[layer].unsqueeze(0),
                scale,
                mask=chunk.mask,
                causal=chunk.mask is None,
                kernel=self.kernel,
            )
            out[a:b] = part[0].transpose(0, 1)
            if lse is not None:
                lse[a:b] = weight[0].transpose(0, 1)
        if lse is not None:
            for shared in self.shared:
                self._read_shared(layer, shared, query, out, lse, scale)
        return out.to(query.dtype)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        dim = key.shape[2]
        for tail in self.tails:
            tail.keys[layer].view(-1, dim).index_copy_(0, tail.index, key[tail.start : tail.stop].reshape(-1, dim))
            tail.values[layer].view(-1, dim).index_copy_(0, tail.index, value[tail.start : tail.stop].reshape(-1, dim))
        for write in self.writes:
            write.keys[layer].copy_(key[write.start : write.stop].transpose(0, 1))
            write.values[layer].copy_(value[write.start : write.stop].transpose(0, 1))

    def _read_shared(self, layer: int, shared: Shared, query: Tensor, out: Tensor, lse: Tensor, scale: float) -> None:
        # Query heads that share a key head, and all readers, are folded into one dimension: one product per key head.
        readers = len(shared.rows)
        _, heads, dim = query.shape
        key_heads = shared.keys.shape[1]
        folded = query.index_select(0, shared.rows).view(readers, key_heads, heads // key_heads, dim)
        part, weight = attend(
            folded.transpose(0, 1).reshape(1, key_heads, -1, dim),
            shared.keys[layer].unsqueeze(0),
            shared.values[layer].unsqueeze(0),
            scale,
            kernel=self.kernel,
        )
        part = part.view(key_heads, readers, -1, dim).transpose(0, 1).reshape(readers, heads, dim)
        weight = weight.view(key_heads, readers, -1).transpose(0, 1).reshape(readers, heads)
        merged, total = merge(out.index_select(0, shared.rows), lse.index_select(0, shared.rows), part, weight)
        out.index_copy_(0, shared.rows, merged)
        lse.index_copy_(0, shared.rows, total)
