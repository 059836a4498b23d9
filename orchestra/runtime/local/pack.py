"""Building one step: the packed row of tokens, and the plan of who reads what."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from orchestra.runtime.attention.kernels import Kernel
from orchestra.runtime.attention.plan import Chunk, Plan, Shared, Tails, Write
from orchestra.runtime.local.gang import Past
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.nodes import Context, NodeState, Part
from orchestra.runtime.local.rotary import Rotary
from orchestra.runtime.local.segments import Memory, Slab

Ints = npt.NDArray[np.int64]
Reads = tuple[torch.Tensor, torch.Tensor, int]
"""Keys, values, and the position of the first."""

SHORT_BYTES = 128 * 1024
"""Segments of at most so many bytes of a layer are copied into one for the rows that read them all: a thread that
grows by single tokens is a chain of them, and each separate read costs as much as copying a megabyte."""


class Pack:
    """A step under construction. Slots come first, one row each, in slot order; then everything else.

    Attributes:
        rows: packed tokens so far.
        budget: prefill tokens that this step may still take.
        slots: each slab in use with its first row and the tokens that each of its slots feeds.
        filled: how many tokens of a sealed node this step computes, and the first of their rows.
        forced: the rows of forced tokens before the last one, which is in the slot's own row.
        gangs: by first row of a slab: the rows that read each slot, and by how much they are turned.
        computed: positions whose keys and values this step computes (echoes are not); `scratch` of them are not kept.
    """

    def __init__(self, memory: Memory, kernel: Kernel, budget: int, rotary: Rotary | None = None) -> None:
        self.memory, self.rotary = memory, rotary
        self.rows = 0
        self.budget = budget
        self.slots: list[tuple[Slab, int, Ints]] = []
        self.filled: dict[NodeState, tuple[int, int]] = {}
        self.forced: dict[Job, range] = {}
        self.gangs: dict[int, tuple[list[list[int]], list[list[int]]]] = {}
        self.computed = self.scratch = 0
        self.plan = Plan(0, kernel=kernel, streams=memory.streams, prefix=memory.prefix)
        self._short = SHORT_BYTES * memory.layers // memory.token_bytes
        self._tokens: list[Ints] = []
        self._positions: list[Ints] = []
        self._echoes: dict[tuple[NodeState, int], int] = {}
        self._groups: dict[tuple[NodeState | Part | Past, int], list[tuple[int, int]]] = {}

    def read(self, state: NodeState | Part | Past, length: int, rows: Iterable[int], turn: int = 0) -> None:
        """Rows that read the first `length` tokens of a node where they are, their queries turned by some positions."""
        readers = [(row, turn) for row in rows]
        if length and readers:
            self._groups.setdefault((state, length), []).extend(readers)

    def add(self, tokens: Ints, positions: Ints) -> range:
        """Append rows; returns their numbers."""
        start, self.rows = self.rows, self.rows + len(tokens)
        self._tokens.append(tokens)
        self._positions.append(positions)
        return range(start, self.rows)

    def add_slab(self, slab: Slab) -> None:
        """One row for each slot in use."""
        n = len(slab.jobs)
        rows = self.add(slab.token[:n], slab.position[:n])
        self.slots.append((slab, rows.start, np.ones(n, np.int64)))
        self.computed += n

    def add_forced(self, job: Job, fed: Ints) -> bool:
        """Feed given tokens to a slot: the last goes into the slot's own row, those before it become a chunk.

        Returns:
            Whether all of them are fed now, so that the slot's row predicts a sampled token.
        """
        slab, slot = job.slab, job.slot
        assert slab is not None
        # A chunk of a gang's member is read by the others as it is, so it does not depend on what else there is to do.
        take = max(1, min(self.budget, job.given - job.fed)) if job.gang is None else job.given - job.fed
        self.budget -= take
        fed[slot] = take
        first = job.state.start + job.fed
        slab.token[slot] = job.state.tokens[job.fed + take - 1]
        slab.position[slot] = first + take - 1
        if take > 1:
            tokens = np.array(job.state.tokens[job.fed : job.fed + take - 1])
            rows = self.forced[job] = self.add(tokens, np.arange(first, first + take - 1))
            used = int(slab.used[slot])
            self._chunk(rows, slab.keys[:, slot], slab.values[:, slot], used)
            for state, length in job.inplace:
                self.read(state, length, rows)
        return job.fed + take == job.given

    def add_fill(self, state: NodeState, context: Context, take: int) -> range:
        """Compute the next `take` tokens of a node that no generation fills; returns their rows."""
        a = state.computed
        tokens = np.array(state.tokens[a : a + take])
        rows = self.add(tokens, np.arange(state.start + a, state.start + a + take))
        segment = state.segment
        assert segment is not None  # since somebody who needs it was admitted
        self._chunk(rows, segment.keys, segment.values, a)
        for other, length in context:
            self.read(other, length, rows)
        self.filled[state] = (take, rows.start)  # what this step writes cannot be copied before it
        self.budget -= take
        return rows

    def add_score(self, score: Score) -> range:
        """Compute the next tokens of a scoring in its scratch segment; returns their rows."""
        segment, a = score.segment, score.fed
        assert segment is not None
        take = min(self.budget, len(score.tokens) - a)
        rows = self.add(np.array(score.tokens[a : a + take]), np.arange(score.start + a, score.start + a + take))
        self._chunk(rows, segment.keys, segment.values, a)
        for state, length in score.context:
            self.read(state, length, rows)
        self.scratch += take
        self.budget -= take
        return rows

    def row_of(self, state: NodeState, index: int, context: Context) -> int:
        """The row whose logits follow token `index` of a node: one of this step, else an echo that writes nothing.

        Args:
            state: the node.
            index: of the token in it.
            context: what it sees, itself included.
        """
        take, first = self.filled.get(state, (0, 0))
        if state.computed <= index < state.computed + take:
            return first + index - state.computed
        row = self._echoes.get((state, index))
        if row is None:
            rows = self.add(np.array([state.tokens[index]]), np.array([state.start + index]))
            for other, length in context:
                self.read(other, length, rows)
            row = self._echoes[state, index] = rows.start
        return row

    def groups(self) -> list[Shared]:
        """The shared reads: one for each segment and length, one for all short segments that the same rows read."""
        found: dict[tuple[tuple[int, int], ...], list[list[Reads]]] = {}
        for (state, length), rows in self._groups.items():
            alone = length > self._short or state in self.filled or isinstance(state, Part)  # see `add_fill`
            groups = found.setdefault(tuple(sorted(rows)), [[]])
            keys, values = state.reads(length)
            part = keys, values, state.start
            groups.append([part]) if alone else groups[0].append(part)
        shared = []
        for readers, groups in found.items():
            index, turns = (torch.tensor(each, device=self.memory.device) for each in zip(*readers, strict=True))
            by = turns if any(turn for _, turn in readers) else None
            shared += [Shared(index, *_joined(parts), by) for parts in groups if parts]
        return shared

    def grown(self, slab: Slab) -> list[int]:
        """The node's own tokens in each slot after this step."""
        fed = next(fed for other, _, fed in self.slots if other is slab)
        return [job.fed + n for job, n in zip(slab.jobs, fed.tolist(), strict=True)]

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions, `[rows]` each."""
        tokens, positions = np.concatenate(self._tokens), np.concatenate(self._positions)
        return torch.from_numpy(tokens).to(self.memory.device), torch.from_numpy(positions).to(self.memory.device)

    def finish(self, positions: torch.Tensor) -> Plan:
        """Complete the plan."""
        device = self.memory.device
        for slab, start, fed in self.slots:
            used = slab.used[: len(fed)] + fed
            readers = [torch.tensor(each, device=device) for each in self.gangs.get(start, ())]
            self.plan.tails.append(
                Tails.over(start, slab.keys, slab.values, torch.from_numpy(used).to(device), int(used.max()), *readers)
            )
        self.plan.rows, self.plan.positions = self.rows, positions
        self.plan.shared = self.groups()
        self.plan.rotary = self.rotary
        return self.plan

    def _chunk(self, rows: range, keys: torch.Tensor, values: torch.Tensor, used: int) -> None:
        """Rows that write to, and read, `keys` and `values` `[layers, heads, capacity, dim]` after `used` tokens."""
        a, b = rows.start, rows.stop
        end = used + b - a
        self.plan.writes.append(Write(a, b, keys[:, :, used:end], values[:, :, used:end]))
        self.plan.chunks.append(Chunk.over(a, b, keys[:, :, :end], values[:, :, :end]))
        self.computed += b - a


def _joined(parts: list[Reads]) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[int, int], ...]]:
    """Several reads as one: copies one after another, and where each stands."""
    keys, values, starts = zip(*parts, strict=True)
    stretches = tuple((start, part.shape[2]) for start, part in zip(starts, keys, strict=True))
    if len(parts) == 1:
        return keys[0], values[0], stretches
    return torch.cat(keys, 2), torch.cat(values, 2), stretches
