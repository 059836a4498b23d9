"""One layer of decode attention: readers of one prefix, by a plan and by batched attention over replicated keys.

Ours reads the prefix in place, once for all readers, or copied in front of each reader's tail, as the cost rule says;
both ways are measured. Its time includes writing the new keys and values. The peers are one call of PyTorch's
`scaled_dot_product_attention` over keys and values that are replicated for each reader: with `enable_gqa`, and with the
query heads that share a key head folded into queries, which is the best that can be done without sharing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from orchestra.benchmarks.machine import Limits, limits, times
from orchestra.benchmarks.report import Column
from orchestra.runtime.attention.cost import in_place
from orchestra.runtime.attention.plan import Plan, Shared, Tails

READERS = (8, 32, 64, 128, 256)
PREFIXES = (16, 64, 256, 1024, 4096, 16384)

COLUMNS = (
    Column("dtype", "dtype"),
    Column("readers", "readers"),
    Column("prefix", "prefix", ","),
    Column("chosen", "reads"),
    Column("in_place_ms", "in place, ms", ",.2f"),
    Column("copied_ms", "copied, ms", ",.2f"),
    Column("sdpa_ms", "SDPA, ms", ",.2f"),
    Column("folded_ms", "folded SDPA, ms", ",.2f"),
    Column("over_sdpa", "ours over SDPA", ".2f"),
    Column("over_folded", "over folded", ".2f"),
    Column("gigabytes", "GB/s", ",.1f"),
    Column("gigaflops", "GFLOP/s", ",.0f"),
    Column("of_limit", "of the limit", ".0%"),
)
NOTES = (
    "Milliseconds are the shortest of several rounds in which all take turns. `reads` is what the cost rule chose; "
    "ratios are of its time. GB/s and GFLOP/s are of its own reads and operations. The limit is the least time that "
    "the machine's measured limits (a long sum, a large matrix product) allow for them; caches can beat it."
)


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and its readers.

    Attributes:
        readers: rows that read the prefix, one query each.
        prefix: tokens that all of them read.
        tails: tokens that each has of its own.
        heads, key_heads, dim: of the layer.
        dtype: of keys, values and queries.
    """

    readers: int
    prefix: int
    tails: int
    heads: int
    key_heads: int
    dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token."""
        return 2 * self.key_heads * self.dim * self.dtype.itemsize

    @property
    def replica_bytes(self) -> int:
        """Bytes of keys and values when every reader has its own."""
        return self.readers * (self.prefix + self.tails) * self.token_bytes

    @property
    def operations(self) -> int:
        """Floating-point operations of the scores and of the weighted sums."""
        return 4 * self.readers * self.heads * self.dim * (self.prefix + self.tails)

    def read_bytes(self, shared: bool) -> int:
        """Bytes that must be read: the prefix once, or once for each reader."""
        return (self.prefix * (1 if shared else self.readers) + self.readers * self.tails) * self.token_bytes


def grid(
    readers: tuple[int, ...],
    prefixes: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    *,
    tails: int,
    heads: int,
    key_heads: int,
    dim: int,
    max_bytes: float,
) -> list[Case]:
    """All combinations whose replicas fit."""
    cases = [Case(r, p, tails, heads, key_heads, dim, t) for t, r, p in itertools.product(dtypes, readers, prefixes)]
    return [case for case in cases if case.replica_bytes <= max_bytes]


@torch.inference_mode()
def rows(cases: list[Case], device: torch.device, *, seconds: float = 0.5) -> Iterator[dict[str, Any]]:
    """Measure each case; see `COLUMNS`.

    Args:
        cases: what to measure.
        device: where.
        seconds: how long to go on for each way of a case.
    """
    known: dict[torch.dtype, Limits] = {}
    for case in cases:
        if case.dtype not in known:
            known[case.dtype] = limits(case.dtype, device, seconds=seconds)
        yield _row(case, device, known[case.dtype], seconds)


def _row(case: Case, device: torch.device, most: Limits, seconds: float) -> dict[str, Any]:
    draw = torch.Generator(device).manual_seed(0)
    readers, total, scale = case.readers, case.prefix + case.tails, case.dim**-0.5

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=case.dtype, device=device).normal_(generator=draw)

    query, key, value = (normal(readers, n, case.dim) for n in (case.heads, case.key_heads, case.key_heads))
    prefix = [normal(1, case.key_heads, case.prefix, case.dim) for _ in range(2)]
    arena = [normal(1, readers, case.key_heads, case.tails, case.dim) for _ in range(2)]
    replicas = []
    for common, own, new in zip(prefix, arena, (key, value), strict=True):
        own[0, :, :, -1] = new
        replica = torch.empty(1, readers, case.key_heads, total, case.dim, dtype=case.dtype, device=device)
        replica[0, :, :, : case.prefix], replica[0, :, :, case.prefix :] = common, own[0]
        replicas.append(replica)

    def plan(tails: list[Tensor], length: int, shared: list[Shared]) -> Plan:
        used = torch.full((readers,), length, device=device)
        return Plan(readers, tails=[Tails.over(0, tails[0], tails[1], used, length)], shared=shared)

    there = plan(arena, case.tails, [Shared(torch.arange(readers, device=device), prefix[0], prefix[1])])
    copied = plan(replicas, total, [])
    one = query.unsqueeze(2)
    folded = query.view(readers, case.key_heads, -1, case.dim)
    keys, values = (replica[0] for replica in replicas)
    ways: list[Callable[[], Tensor]] = [
        lambda: there.run(0, query, key, value, scale),
        lambda: copied.run(0, query, key, value, scale),
        lambda: scaled_dot_product_attention(one, keys, values, scale=scale, enable_gqa=True),
        lambda: scaled_dot_product_attention(folded, keys, values, scale=scale),
    ]
    _check([way().reshape(query.shape) for way in ways], case.dtype)
    found = [1000 * second for second in times(ways, device, seconds=seconds, least=3)]
    shared = in_place(case.prefix, readers, case.token_bytes)
    ours = found[0] if shared else found[1]
    read, operations = case.read_bytes(shared), case.operations
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "readers": readers,
        "prefix": case.prefix,
        "tails": case.tails,
        "heads": [case.heads, case.key_heads, case.dim],
        "chosen": "in place" if shared else "copied",
        **dict(zip(("in_place_ms", "copied_ms", "sdpa_ms", "folded_ms"), found, strict=True)),
        "over_sdpa": found[2] / ours,
        "over_folded": found[3] / ours,
        "gigabytes": read / ours / 1e6,
        "gigaflops": operations / ours / 1e6,
        "of_limit": 1000 * most.seconds(read, operations) / ours,
        "limits": [most.read / 1e9, most.multiply / 1e9],
    }


def _check(outs: list[Tensor], dtype: torch.dtype) -> None:
    """All ways must agree, or their times mean nothing."""
    worst = max(float((out.float() - outs[-1].float()).abs().max()) for out in outs[:-1])
    assert worst <= (1e-3 if dtype == torch.float32 else 3e-2), f"the ways differ by {worst:.1e}"
