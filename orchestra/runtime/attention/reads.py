"""The ways in which packed rows read keys: a common segment, their own node, a padded arena of growing tails.

Each read gives, for its rows, attention over its own keys and the log of the normaliser; `Plan` merges them. All of
them fold query heads that share a key head, and all readers of the same keys, into one dimension: one matrix product
per key head, where replicated keys would need a matrix-vector product per query (Hydragen, arXiv:2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orchestra.runtime.attention.kernels import Kernel, attend


class Rotary(Protocol):
    """How a model turns queries and keys by their position."""

    def turn(self, x: Tensor, by: Tensor, layer: int) -> Tensor:
        """Rotate vectors that are rotated already to where they would be `by` positions later.

        Args:
            x: `[..., heads, dim]`.
            by: int64, `[...]`.
            layer: index of the layer.
        """


class Scoring(NamedTuple):
    """What turns products of queries and keys into scores.

    Attributes:
        scale: factor on the products.
        softcap: c of `c * tanh(scores / c)`; None for none.
        kernel: see `kernels`.
    """

    scale: float
    softcap: float | None
    kernel: Kernel


class Attended(NamedTuple):
    """Attention over a part of the keys, and the log of the normaliser.

    Attributes:
        out: `[rows, heads, dim]`; or `[rows, key heads, groups, dim]`, which spares whoever copies it a copy.
        lse: `[rows, heads]`.
    """

    out: Tensor
    lse: Tensor


@dataclass(slots=True, eq=False)
class Shared:
    """One segment that any number of rows reads in full.

    Attributes:
        rows: the readers, int64, ascending.
        keys, values: `[layers, key heads, tokens, dim]`.
        starts: `(position of the first, number)` of each stretch of tokens; windows need it.
        turns: by how many positions each reader's query is turned for this segment, int64 `[readers]`: the segment
            then stands elsewhere than where its keys were computed. None for no reader.
        mask: `[readers, tokens]`, added to the scores.
    """

    rows: Tensor
    keys: Tensor
    values: Tensor
    starts: tuple[tuple[int, int], ...] = ()
    turns: Tensor | None = None
    mask: Tensor | None = None

    def read(self, layer: int, query: Tensor, scoring: Scoring, rotary: Rotary | None) -> Attended:
        """See the module; `query` is `[rows of the plan, heads, dim]`."""
        readers, key_heads = len(self.rows), self.keys.shape[1]
        _, heads, dim = query.shape
        if readers < len(query):  # else they are all rows, in order
            query = query.index_select(0, self.rows)
        if self.turns is not None:
            assert rotary is not None
            query = rotary.turn(query, self.turns, layer)
        groups = heads // key_heads
        mask = None if self.mask is None else self.mask.repeat_interleave(groups, 0)
        out, lse = attend(
            query.reshape(readers, key_heads, groups, dim).transpose(0, 1).reshape(1, key_heads, -1, dim),
            self.keys[layer].unsqueeze(0),
            self.values[layer].unsqueeze(0),
            scoring.scale,
            mask=mask,
            softcap=scoring.softcap,
            kernel=scoring.kernel,
        )
        return Attended(
            out.view(key_heads, readers, groups, dim).transpose(0, 1),
            lse.view(key_heads, readers, groups).transpose(0, 1).reshape(readers, heads),
        )

    def within(self, window: int, positions: Tensor) -> Shared | None:
        """What is left of the read when a query sees the keys of the last `window` positions only; None for nothing."""
        at = torch.cat([torch.arange(start, start + n, device=positions.device) for start, n in self.starts])
        seen = positions[self.rows].unsqueeze(1) - at < window
        readers, columns = seen.any(1), torch.nonzero(seen.any(0)).flatten()
        if not len(columns):
            return None
        first, last = int(columns[0]), int(columns[-1]) + 1
        seen = seen[readers, first:last]
        mask = None if bool(seen.all()) else torch.zeros(seen.shape, device=at.device).masked_fill_(~seen, -torch.inf)
        keys, values = self.keys[:, :, first:last], self.values[:, :, first:last]
        return Shared(self.rows[readers], keys, values, mask=mask)


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

    def read(self, layer: int, query: Tensor, scoring: Scoring, rotary: Rotary | None) -> Attended:
        """See the module; `query` is `[rows of the plan, heads, dim]`."""
        out, lse = attend(
            query[self.start : self.stop].transpose(0, 1).unsqueeze(0),
            self.keys[layer].unsqueeze(0),
            self.values[layer].unsqueeze(0),
            scoring.scale,
            mask=self.mask,
            causal=self.mask is None,
            softcap=scoring.softcap,
            kernel=scoring.kernel,
        )
        return Attended(out[0].transpose(0, 1), lse[0].transpose(0, 1))

    def within(self, window: int, positions: Tensor) -> Chunk:
        """The read when a query sees the keys of the last `window` positions only."""
        rows, tokens = self.stop - self.start, self.keys.shape[2]
        first = max(0, tokens - rows + 1 - window)  # what the first row no longer sees, none does
        keys, values = self.keys[:, :, first:], self.values[:, :, first:]
        tokens -= first
        mask = torch.full((rows, tokens), -torch.inf, device=positions.device)
        mask = mask.triu(tokens - rows + 1) + mask.tril(tokens - rows - window)
        return Chunk(self.start, self.stop, keys, values, mask.nan_to_num_(0.0, neginf=-torch.inf))


@dataclass(slots=True, eq=False)
class Tails:
    """Growing nodes in the slots of a padded arena: row `start + i` is the newest token of slot i.

    Attributes:
        start: the first row.
        keys, values: the whole arena, `[layers, slots, key heads, capacity, dim]`.
        used: tokens in each slot, the new ones included, int64 `[slots in use]`.
        longest: the maximum of `used`.
        mask: `[slots in use, 1, 1, longest]`, added to the scores; None when all are equally long.
        index: where the new tokens go in `[slots * key heads * capacity]`, `[slots in use * key heads]`.
        readers: rows that read each slot, int64 `[slots in use, readers]`; None when each is read by its own row only.
        turns: as in `Shared`, `[slots in use, readers]`.
        room: the mask of the whole capacity, once a step has followed another.
    """

    start: int
    keys: Tensor
    values: Tensor
    used: Tensor
    longest: int
    mask: Tensor | None
    index: Tensor
    readers: Tensor | None = None
    turns: Tensor | None = None
    room: Tensor | None = None

    @classmethod
    def over(
        cls,
        start: int,
        keys: Tensor,
        values: Tensor,
        used: Tensor,
        longest: int,
        readers: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> Tails:
        """The tails with their mask and index."""
        _, _, heads, capacity, _ = keys.shape
        device = keys.device
        mask = None
        if int(used.min()) < longest:
            beyond = torch.arange(longest, device=device) >= used.view(-1, 1, 1, 1)
            mask = torch.zeros(beyond.shape, device=device).masked_fill_(beyond, -torch.inf)
        lines = torch.arange(len(used) * heads, device=device).view(-1, heads) * capacity
        index = (lines + (used - 1).unsqueeze(1)).view(-1)
        return cls(start, keys, values, used, longest, mask, index, readers, turns)

    @property
    def stop(self) -> int:
        """The row after the last."""
        return self.start + self.used.shape[0]

    def advance(self) -> None:
        """Go on to the next step: every slot has one token more."""
        if self.mask is not None and self.room is None:
            self.room = self.mask.new_full((*self.mask.shape[:3], self.keys.shape[3]), -torch.inf)
            self.room[..., : self.longest] = self.mask
        if self.room is not None:
            self.room.view(self.room.shape[0], -1).scatter_(1, self.used.unsqueeze(1), 0.0)
            self.mask = self.room[..., : self.longest + 1]
        self.longest += 1
        self.used += 1
        self.index += 1

    def read(self, layer: int, query: Tensor, scoring: Scoring, rotary: Rotary | None) -> Attended:
        """See the module; `query` is `[rows of the plan, heads, dim]`. Rows come in the order of `readers`."""
        slots, key_heads = self.used.shape[0], self.keys.shape[2]
        _, heads, dim = query.shape
        groups = heads // key_heads
        if self.readers is None:
            query = query[self.start : self.stop]
            readers = 1
        else:
            query = query.index_select(0, self.readers.view(-1))
            readers = self.readers.shape[1]
            if self.turns is not None:
                assert rotary is not None
                query = rotary.turn(query, self.turns.view(-1), layer)
            query = query.view(slots, readers, key_heads, groups, dim).transpose(1, 2)
        out, lse = attend(
            query.reshape(slots, key_heads, readers * groups, dim),
            self.keys[layer, :slots, :, : self.longest],
            self.values[layer, :slots, :, : self.longest],
            scoring.scale,
            mask=self.mask,
            softcap=scoring.softcap,
            kernel=scoring.kernel,
        )
        if readers > 1:
            out = out.view(slots, key_heads, readers, groups, dim).transpose(1, 2)
            lse = lse.view(slots, key_heads, readers, groups).transpose(1, 2)
        return Attended(out.reshape(slots * readers, heads, dim), lse.reshape(slots * readers, heads))

    def within(self, window: int, positions: Tensor) -> Tails:
        """The read when a query sees the keys of the last `window` positions only: those of a slot are consecutive."""
        assert self.readers is None, "a windowed model has no concurrent cache"
        columns = torch.arange(self.longest, device=positions.device)
        used = self.used.view(-1, 1, 1, 1)
        unseen = (columns >= used) | (columns < used - window)
        mask = torch.zeros(unseen.shape, device=positions.device).masked_fill_(unseen, -torch.inf)
        return Tails(self.start, self.keys, self.values, self.used, self.longest, mask, self.index)


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


Read = Shared | Chunk | Tails
