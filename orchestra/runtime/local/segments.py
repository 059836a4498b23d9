"""Where keys and values live: a segment for each node, a padded arena slot while it grows.

A thread that is being decoded has a slot in a `Slab`: all slots of a slab are read by one batched call. In front of its
own tail a slot may hold copies of short context segments (its *head*): reading those again for each reader costs less
than a separate call. When the node ends, its tail is sealed into a `Segment` of exactly its size.
"""

from __future__ import annotations

import math
import sys
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
        limit: most bytes, padding included; None for no limit. Who allocates looks at `left` first.
        bytes: allocated now, padding included.
        peak: the most that ever were.
    """

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    windows: bool = False
    limit: int | None = None
    bytes: int = 0
    peak: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.heads * self.dim * self.dtype.itemsize

    @property
    def left(self) -> int:
        """Bytes that may still be allocated."""
        return sys.maxsize if self.limit is None else self.limit - self.bytes

    def allocate(self, *shape: int, zero: bool = False) -> Tensor:
        """Keys or values `[layers, *shape, dim]`, counted until `free`; uninitialised unless `zero`."""
        make = _zeros if zero else torch.empty
        tensor = make((self.layers, *shape, self.dim), dtype=self.dtype, device=self.device)
        self.bytes += tensor.nbytes
        self.peak = max(self.peak, self.bytes)
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

    @property
    def bytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.values.nbytes

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
        reserved: slots that are kept free for generations to come.
        keys, values: `[layers, slots, heads, capacity, dim]`.
        used: tokens with keys and values in each slot, heads included.
        token, position: the next token to feed for each slot.
    """

    def __init__(self, memory: Memory, capacity: int, slots: int, gang: LocalGang | None = None) -> None:
        self.memory = memory
        self.capacity = capacity
        self.gang = gang
        self.jobs: list[Job] = []
        self.reserved = 0
        self._allocate(slots)
        self.used = np.zeros(slots, np.int64)
        self.token = np.zeros(slots, np.int64)
        self.position = np.zeros(slots, np.int64)

    def _allocate(self, slots: int) -> None:
        # Zeros, not garbage: masked columns still enter the products, and 0 x nan is nan.
        self.keys = self.memory.allocate(slots, self.memory.heads, self.capacity, zero=True)
        self.values = self.memory.allocate(slots, self.memory.heads, self.capacity, zero=True)

    @property
    def slots(self) -> int:
        """How many there are."""
        return len(self.used)

    @property
    def taken(self) -> int:
        """Slots in use or reserved."""
        return len(self.jobs) + self.reserved

    def resize(self, slots: int) -> None:
        """Have so many slots, at least those in use."""
        n = len(self.jobs)
        keys, values = self.keys, self.values
        self._allocate(slots)
        self.keys[:, :n] = keys[:, :n]
        self.values[:, :n] = values[:, :n]
        self.memory.free(keys, values)
        used, token, position = self.used, self.token, self.position
        self.used, self.token, self.position = (np.zeros(slots, np.int64) for _ in range(3))
        self.used[:n], self.token[:n], self.position[:n] = used[:n], token[:n], position[:n]

    def add(self, job: Job) -> int:
        """Give a generation the next slot, which must be there (`Arena.reserve`)."""
        self.jobs.append(job)
        return len(self.jobs) - 1

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

    def capacity(self, tokens: int, gang: LocalGang | None = None) -> int:
        """Of the slots for so many tokens; all members of a gang are in one slab."""
        capacity = SMALLEST_SLOT if gang is None or gang.slab is None else gang.slab.capacity
        while capacity < tokens:
            capacity *= 2
        return capacity

    def cost(self, capacity: int, gang: LocalGang | None = None) -> int:
        """Bytes that must be free for one more slot; while a slab is being copied to a larger one, both are there."""
        slab = self.slabs.get((capacity, gang))
        slots = 1 if slab is None else slab.slots + 1 if slab.taken == slab.slots else 0
        if gang is not None and gang.slab is not None and slab is None:
            slots = gang.slab.taken + 1  # all have to move
        return slots * capacity * self.memory.token_bytes

    def growth(self, slab: Slab, capacity: int) -> int:
        """Bytes that must be free for one generation of a slab, or a whole gang, to move to larger slots."""
        return self.cost(capacity) if slab.gang is None else slab.taken * capacity * self.memory.token_bytes

    def reserve(self, job: Job, capacity: int) -> None:
        """Keep a slot free for a generation; slabs double, as far as there is memory."""
        slab = self.slabs.get((capacity, job.gang))
        if job.gang is not None and job.gang.slab is not None and slab is None:
            slab = self.enlarge(job.gang.slab, capacity, job.gang.slab.taken + 1)
        elif slab is None:
            # The others of a group come next.
            slab = self._new(
                capacity, job.gang, 1 if job.group is None else min(job.group.members, self._most(capacity))
            )
        elif slab.taken == slab.slots:
            slab.resize(min(2 * slab.slots, self._most(capacity)))
        slab.reserved += 1
        job.reserved = slab

    def _most(self, capacity: int) -> int:
        return self.memory.left // (capacity * self.memory.token_bytes)

    def _new(self, capacity: int, gang: LocalGang | None, least: int) -> Slab:
        slots = max(least, min(NEW_SLAB_TOKENS // capacity, self._most(capacity)))
        slab = self.slabs[capacity, gang] = Slab(self.memory, capacity, slots, gang)
        if gang is not None:
            gang.slab = slab
        return slab

    def enlarge(self, slab: Slab, capacity: int, slots: int) -> Slab:
        """Move a whole gang to a slab with slots of another capacity."""
        new = self._new(capacity, slab.gang, slots)
        for job in slab.jobs.copy():
            self._move(job, new)
        new.reserved, slab.reserved = slab.reserved, 0
        return new

    @staticmethod
    def reserved(job: Job) -> Slab | None:
        """Where a slot is kept free for a generation; a gang may have moved since."""
        return job.gang.slab if job.gang is not None and job.reserved is not None else job.reserved

    def place(self, job: Job) -> Slab:
        """Give a generation the slot that was reserved for it; sets its slab and slot."""
        slab, job.reserved = self.reserved(job), None
        assert slab is not None
        slab.reserved -= 1
        job.slab, job.slot = slab, slab.add(job)
        return slab

    def move(self, job: Job) -> None:
        """Move a generation to the slot that was reserved for it."""
        new, job.reserved = job.reserved, None
        assert new is not None
        new.reserved -= 1
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

    def full(self) -> list[Job]:
        """Generations whose slot is full."""
        found = []
        for slab in self.slabs.values():
            used = slab.used[: len(slab.jobs)]
            if not len(used) or int(used.max()) < slab.capacity:
                continue
            slots = np.flatnonzero(used >= slab.capacity)
            found += [slab.jobs[slot] for slot in slots.tolist()]
        return found

    def leave(self, job: Job) -> None:
        """Free a generation's slot, or the one reserved for it."""
        if (kept := self.reserved(job)) is not None:
            kept.reserved -= 1
            job.reserved = None
        if job.slab is not None:
            job.slab.remove(job.slot)
            job.slab = None

    def trim(self) -> None:
        """Give back slabs without a generation."""
        for key in [key for key, slab in self.slabs.items() if not slab.taken]:
            slab = self.slabs.pop(key)
            slab.free()
            if slab.gang is not None and slab.gang.slab is slab:
                slab.gang.slab = None

    def shrink(self) -> None:
        """Give back the slots that nobody uses, as far as there is memory to copy the others."""
        self.trim()
        for slab in self.slabs.values():
            if slab.taken < slab.slots and slab.taken * slab.capacity * self.memory.token_bytes <= self.memory.left:
                slab.resize(slab.taken)
