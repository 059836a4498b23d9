"""Which packed queries read which keys: made once per step, used by every layer.

A step packs tokens of many threads into one row of `rows` queries. Their own keys are written first; then each set of
keys is read once for all its readers, and the parts are merged by log-sum-exp. Nothing here knows an engine: keys and
values are tensors, rows are numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestra.runtime.attention.kernels import Kernel
from orchestra.runtime.attention.reads import Chunk, Read, Rotary, Scoring, Shared, Tails, Write

__all__ = ["Chunk", "Plan", "Shared", "Tails", "Write"]


@dataclass(slots=True, eq=False)
class Reads:
    """The reads of a kind of layer, and where each puts its part.

    A row that is in several reads has as many parts. Part n of all rows lies in `outs[n]`, so that all rows are merged
    together.

    Attributes:
        reads: what to do.
        places: of each read: where its rows go in `[parts * rows]`, or the first place if one follows the other.
        parts: most parts of a row.
    """

    reads: list[Read]
    places: list[Tensor | int]
    parts: int
    outs: Tensor | None = None
    lses: Tensor | None = None

    @classmethod
    def of(cls, rows: int, reads: list[Read], device: torch.device) -> Reads:
        """Give each read its places."""
        count = torch.zeros(rows, dtype=torch.int64)
        places: list[Tensor | int] = []
        for read in reads:
            if isinstance(read, Shared):
                groups = [read.rows.cpu()]
            elif isinstance(read, Tails) and read.readers is not None:
                groups = list(read.readers.cpu())
            else:
                groups = [torch.arange(read.start, read.stop)]
            place = []
            for group in groups:  # in a group no row comes twice
                place.append(count[group] * rows + group)
                count[group] += 1
            found = torch.cat(place)
            first, n = int(found[0]), len(found)
            stretch = bool((found == torch.arange(first, first + n)).all())
            places.append(first if stretch else found.to(device))
        return cls(reads, places, max(1, int(count.max())))

    def run(self, layer: int, query: Tensor, scoring: Scoring, rotary: Rotary | None) -> Tensor:
        """Attention over everything that each row reads, `[rows, heads, dim]`."""
        rows, heads, dim = query.shape
        if len(self.reads) == 1 and self.parts == 1:
            whole = self.reads[0].read(layer, query, scoring, rotary).out
            if whole.shape[0] == rows:
                return whole.reshape(query.shape).to(query.dtype)
        if self.outs is None or self.outs.shape[2:] != query.shape[1:]:
            # What no part is put into stays zero, with weight zero, in every layer.
            self.outs = torch.zeros(self.parts, rows, heads, dim, device=query.device)
            self.lses = torch.full((self.parts, rows, heads), -torch.inf, device=query.device)
        outs, lses = self.outs, self.lses
        assert lses is not None
        for read, place in zip(self.reads, self.places, strict=True):
            out, lse = read.read(layer, query, scoring, rotary)
            if isinstance(place, int):
                n = out.shape[0]
                outs.view(-1, heads, dim)[place : place + n].view(out.shape).copy_(out)
                lses.view(-1, heads)[place : place + n] = lse
            else:
                outs.view(-1, heads, dim).index_copy_(0, place, out.reshape(-1, heads, dim).float())
                lses.view(-1, heads).index_copy_(0, place, lse)
        # Every row has a first part, so there is no difference of two infinities.
        merged, normaliser = outs[0], lses[0]
        for n in range(1, self.parts):
            merged = merged.lerp(outs[n], (lses[n] - normaliser).sigmoid_().unsqueeze(-1))
            normaliser = normaliser.logaddexp(lses[n])
        return merged.to(query.dtype, copy=self.parts == 1)


@dataclass(slots=True, eq=False)
class Plan:
    """All writes and reads of a step. Every row is read for by at least one of its reads.

    Attributes:
        rows: number of packed tokens.
        tails, chunks, writes, shared: see their classes.
        kernel: which attention kernel to use.
        positions: of the rows, int64 `[rows]`; models with windows need them.
        rotary: how the model turns queries; reads with turns need it.
        prefix: keys and values without positions, which every row reads whatever its window; `[layers, key heads,
            tokens, dim]` each.
        streams: how many vectors each row has, one after another; the heads of all of them are heads of the row.
        layers_run: how often `run` was called; an engine checks that it was once a layer.
    """

    rows: int
    tails: list[Tails] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    writes: list[Write] = field(default_factory=list)
    shared: list[Shared] = field(default_factory=list)
    kernel: Kernel = "auto"
    positions: Tensor | None = None
    rotary: Rotary | None = None
    prefix: tuple[Tensor, Tensor] | None = None
    streams: int = 1
    layers_run: int = 0
    _reads: dict[int | None, Reads] = field(default_factory=dict)

    def run(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Write the new keys and values of one layer, then attend.

        Args:
            layer: index of the layer.
            query: `[rows * streams, heads, dim]`, rotated.
            key: `[rows * streams, key heads, dim]`, rotated.
            value: like `key`.
            scale: factor on the scores.
            window: a query at position p sees keys at positions above p - window; None for all.
            softcap: c of `c * tanh(scores / c)`; None for none.

        Returns:
            Like `query`.
        """
        self.layers_run += 1
        shape = query.shape
        if self.streams > 1:
            query, key, value = (x.reshape(self.rows, -1, x.shape[2]) for x in (query, key, value))
        self._write(layer, key, value)
        reads = self._reads.get(window)
        if reads is None:
            reads = self._reads[window] = self._read(window, query.device)
        out = reads.run(layer, query, Scoring(scale, softcap, self.kernel), self.rotary)
        return out.view(shape) if self.streams > 1 else out

    def advance(self, positions: Tensor) -> None:
        """Make this plan, which has nothing but tails and shared reads, that of the next step.

        Args:
            positions: of the rows.
        """
        for tail in self.tails:
            tail.advance()
        self.positions = positions
        self.layers_run = 0
        for window in [window for window in self._reads if window is not None]:
            del self._reads[window]  # what is in a window depends on the position

    def _read(self, window: int | None, device: torch.device) -> Reads:
        reads: list[Read | None] = [*self.tails, *self.chunks, *self.shared]
        if window is not None:
            assert self.positions is not None
            reads = [read.within(window, self.positions) for read in reads if read is not None]
        if self.prefix is not None:
            reads.append(Shared(torch.arange(self.rows, device=device), *self.prefix))
        return Reads.of(self.rows, [read for read in reads if read is not None], device)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        dim = key.shape[2]
        for tail in self.tails:
            tail.keys[layer].view(-1, dim).index_copy_(0, tail.index, key[tail.start : tail.stop].reshape(-1, dim))
            tail.values[layer].view(-1, dim).index_copy_(0, tail.index, value[tail.start : tail.stop].reshape(-1, dim))
        for write in self.writes:
            write.keys[layer].copy_(key[write.start : write.stop].transpose(0, 1))
            write.values[layer].copy_(value[write.start : write.stop].transpose(0, 1))
