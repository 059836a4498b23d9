"""Where keys and values live: a segment for each node, a padded arena slot while it grows.

A thread that is being decoded has a slot in a `Slab`: all slots of a slab are read by one batched call. In front of its
own tail a slot may hold copies of short context segments (its *head*): reading those again for each reader costs less
than a separate call. When the node ends, its tail is sealed into a `Segment` of exactly its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from orchestra.runtime.local.gang import LocalGang
    from orchestra.runtime.local.jobs import Job

SMALLEST_SLOT = 64
"""Tokens in the smallest slot; each larger class has twice as many, so a slot is at least half full."""

NEW_SLAB_TOKENS = 512
"""Room of a new slab, in at least one slot; it doubles when it is full."""


@dataclass(slots=True)
class Memory:
    """The shape of keys and values, and how many bytes of them are allocated.

    Attributes:
        layers, heads, dim: layers, key heads and head dimension of the model.
        dtype, device: of keys and values.
        windows: some layers see the last positions only.
        bytes: allocated now, padding included.
    """

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    windows: bool = False
    bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize

    def allocate(self, *shape: int, zero: bool = False) -> Tensor:
        """Keys or values `[layers, *shape, dim]`, counted until `free`; uninitialised unless `zero`."""
        make = _zeros if zero else torch.empty
        tensor = make((self.layers, *shape, self.dim), dtype=self.dtype, device=self.device)
        self.bytes += tensor.nbytes
        return tensor

    def free(self, *tensors: Tensor) -> None:
        """Stop counting tensors that the caller drops."""
        self.bytes -= sum(tensor.nbytes for tensor in tensors)


def _zeros(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU from calloc, so that pages that nobody writes to are never touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size, line = math.prod(shape) * dtype.itemsize, 64
    raw = np.zeros(size + line, np.uint8)
    start = -raw.ctypes.data % line
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


class Segment:
    """Keys and values of one node, `[layers, heads, capacity, dim]` each; perhaps of fewer tokens than fit."""

    __slots__ = ("keys", "memory", "values")

    def __init__(self, memory: Memory, capacity: int) -> None:
        self.memory = memory
        self._allocate(capacity)

    def _allocate(self, capacity: int) -> None:
        self.keys = self.memory.allocate(self.memory.heads, capacity)
        self.values = self.memory.allocate(self.memory.heads, capacity)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[2]

    def grow(self, capacity: int, used: int) -> None:
        """Make room for `capacity` tokens; the first `used` stay."""
        keys, values = self.keys, self.values
        self._allocate(capacity)
        self.keys[:, :, :used] = keys[:, :, :used]
        self.values[:, :, :used] = values[:, :, :used]
        self.memory.free(keys, values)

    def free(self) -> None:
        """Give the memory back; the segment must not be read after it."""
        self.memory.free(self.keys, self.values)


class Slab:
    """An arena of slots of one capacity. Slots 0..len(jobs)-1 are in use; the last one moves into a gap.

    Args:
        memory: the shape of keys and values.
        capacity: tokens per slot.
        gang: whose members alone have slots here; None for all others.

    Attributes:
        capacity: tokens per slot.
        jobs: the generation in each slot.
        keys, values: `[layers, slots, heads, capacity, dim]`.
        used: tokens with keys and values in each slot, heads included.
        token, position: the next token to feed for each slot.
    """

    def __init__(self, memory: Memory, capacity: int, gang: LocalGang | None = None) -> None:
        self.memory = memory
        self.capacity = capacity
        self.gang = gang
        self.jobs: list[Job] = []
        slots = max(1, NEW_SLAB_TOKENS // capacity)
        self._allocate(slots)
        self.used = np.zeros(slots, np.int64)
        self.token = np.zeros(slots, np.int64)
        self.position = np.zeros(slots, np.int64)

    def _allocate(self, slots: int) -> None:
        # Zeros, not garbage: masked columns still enter the products, and 0 x nan is nan.
        self.keys = self.memory.allocate(slots, self.memory.heads, self.capacity, zero=True)
        self.values = self.memory.allocate(slots, self.memory.heads, self.capacity, zero=True)

    def add(self, job: Job) -> int:
        """Give a generation the next slot, growing the slab if it is full."""
        slot, slots = len(self.jobs), len(self.used)
        if slot == slots:
            keys, values = self.keys, self.values
            self._allocate(2 * slots)
            self.keys[:, :slots] = keys
            self.values[:, :slots] = values
            self.memory.free(keys, values)
            self.used, self.token, self.position = (
                np.concatenate([old, np.zeros_like(old)]) for old in (self.used, self.token, self.position)
            )
        self.jobs.append(job)
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot; the last one moves into it."""
        last = len(self.jobs) - 1
        if slot != last:
            n = int(self.used[last])
            self.keys[:, slot, :, :n] = self.keys[:, last, :, :n]
            self.values[:, slot, :, :n] = self.values[:, last, :, :n]
            for array in (self.used, self.token, self.position):
                array[slot] = array[last]
            self.jobs[slot] = self.jobs[last]
            self.jobs[slot].slot = slot
        self.jobs.pop()

    def free(self) -> None:
        """Give the memory back."""
        self.memory.free(self.keys, self.values)


class Arena:
    """All slabs, by capacity."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.slabs: dict[tuple[int, LocalGang | None], Slab] = {}

    def place(self, job: Job, tokens: int) -> Slab:
        """A slot with room for `tokens`; sets the job's slab and slot. All members of a gang are in one slab."""
        gang, capacity = job.gang, SMALLEST_SLOT
        while capacity < tokens or (gang is not None and gang.slab is not None and capacity < gang.slab.capacity):
            capacity *= 2
        if gang is not None and gang.slab is not None and gang.slab.capacity < capacity:
            self._enlarge(gang.slab, capacity)
        slab = self._slab(capacity, gang)
        job.slab, job.slot = slab, slab.add(job)
        return slab

    def _slab(self, capacity: int, gang: LocalGang | None) -> Slab:
        slab = self.slabs.get((capacity, gang))
        if slab is None:
            slab = self.slabs[capacity, gang] = Slab(self.memory, capacity, gang)
        if gang is not None:
            gang.slab = slab
        return slab

    def _enlarge(self, slab: Slab, capacity: int) -> None:
        """Move everybody to slots of another capacity."""
        new = self._slab(capacity, slab.gang)
        for job in slab.jobs.copy():
            self._move(job, new)

    def _move(self, job: Job, new: Slab) -> None:
        old, i = job.slab, job.slot
        assert old is not None
        job.slab, job.slot = new, new.add(job)
        n, j = int(old.used[i]), job.slot
        new.keys[:, j, :, :n] = old.keys[:, i, :, :n]
        new.values[:, j, :, :n] = old.values[:, i, :, :n]
        new.used[j], new.token[j], new.position[j] = n, old.token[i], old.position[i]
        old.remove(i)

    def make_room(self) -> bool:
        """Move generations whose slot is full to larger ones; returns whether there were any."""
        moved = False
        for slab in list(self.slabs.values()):
            full = np.flatnonzero(slab.used[: len(slab.jobs)] >= slab.capacity)
            if slab.gang is not None and len(full):
                self._enlarge(slab, 2 * slab.capacity)
            else:
                for slot in full[::-1].tolist():  # from the end: the last slot moves into the gap
                    self._move(slab.jobs[slot], self._slab(2 * slab.capacity, None))
            moved |= bool(len(full))
        return moved

    def leave(self, job: Job) -> None:
        """Free a generation's slot."""
        if job.slab is not None:
            job.slab.remove(job.slot)
            job.slab = None

    def trim(self) -> None:
        """Give back slabs without a generation."""
        for key in [key for key, slab in self.slabs.items() if not slab.jobs]:
            slab = self.slabs.pop(key)
            slab.free()
            if slab.gang is not None and slab.gang.slab is slab:
                slab.gang.slab = None
