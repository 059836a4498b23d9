"""The law of losslessness: attention over segments is attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION_TOLERANCE = 1e-5


def check_losslessness(
    seed: int, *, kernel: str = "auto", grouping: bool = True, heads: int = 4, key_heads: int = 2, dim: int = 8
) -> float:
    """Attention by a plan over segments equals dense attention of every row over the keys that it sees.

    A random tree of segments is read by growing tails, prefill chunks and echoes.

    Args:
        seed: everything follows from it.
        kernel: of the plan.
        grouping: read common segments in place, once for all; else every tail holds a copy of its context.
        heads: query heads.
        key_heads: heads of keys and values.
        dim: of a head.

    Returns:
        The largest difference.
    """
    import torch

    from orchestra.runtime.attention.plan import Chunk, Plan, Shared, Tails, Write

    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    segments = [(normal(1, key_heads, n, dim), normal(1, key_heads, n, dim)) for n in (number(1, 40) for _ in range(4))]
    slots, capacity, chunk, echoes = number(1, 5), 96, number(1, 6), number(0, 3)
    rows = slots + chunk + echoes
    query, key, value = normal(rows, heads, dim) * 2, normal(rows, key_heads, dim), normal(rows, key_heads, dim)
    reads = [[i for i in range(4) if number(0, 1)] for _ in range(slots)]
    chunk_reads = [i for i in range(4) if number(0, 1)]
    echo_reads = [[number(0, 3)] for _ in range(echoes)]
    plan = Plan(rows, kernel=kernel)  # type: ignore[arg-type]  # a plain str here, a Literal there
    seen: list[
        tuple[Tensor, Tensor]
    ] = []  # per row, the keys and values `[key heads, tokens, dim]`, put together densely

    arena = torch.zeros(2, 1, slots, key_heads, capacity * 2, dim)
    used = []
    for slot in range(slots):
        copied = [] if grouping else reads[slot]
        own = number(0, 20)
        parts = [(segments[i][0][0], segments[i][1][0]) for i in copied] + [
            (normal(key_heads, own, dim), normal(key_heads, own, dim))
        ]
        past = torch.cat([k for k, _ in parts], 1), torch.cat([v for _, v in parts], 1)
        n = past[0].shape[1]
        arena[0, 0, slot, :, :n], arena[1, 0, slot, :, :n] = past
        used.append(n + 1)
        other = [] if not grouping else [(segments[i][0][0], segments[i][1][0]) for i in reads[slot]]
        new = key[slot].unsqueeze(1), value[slot].unsqueeze(1)
        seen.append(
            (
                torch.cat([*(k for k, _ in other), past[0], new[0]], 1),
                torch.cat([*(v for _, v in other), past[1], new[1]], 1),
            )
        )
    plan.tails.append(Tails.over(0, arena[0], arena[1], torch.tensor(used), max(used)))
    before = number(0, 9)
    grown = normal(2, 1, key_heads, before + chunk, dim)
    old = grown.clone()
    plan.writes.append(Write(slots, slots + chunk, grown[0][:, :, before:], grown[1][:, :, before:]))
    plan.chunks.append(Chunk.over(slots, slots + chunk, grown[0], grown[1]))
    for i in range(chunk):
        new = key[slots : slots + i + 1].transpose(0, 1), value[slots : slots + i + 1].transpose(0, 1)
        seen.append(
            (
                torch.cat([*(segments[s][0][0] for s in chunk_reads), old[0, 0, :, :before], new[0]], 1),
                torch.cat([*(segments[s][1][0] for s in chunk_reads), old[1, 0, :, :before], new[1]], 1),
            )
        )
    for found in echo_reads:
        seen.append(
            (torch.cat([segments[s][0][0] for s in found], 1), torch.cat([segments[s][1][0] for s in found], 1))
        )
    for i, (keys, values) in enumerate(segments):
        readers = [slot for slot in range(slots) if grouping and i in reads[slot]]
        readers += range(slots, slots + chunk) if i in chunk_reads else []
        readers += [slots + chunk + e for e in range(echoes) if i in echo_reads[e]]
        if readers:
            plan.shared.append(Shared(torch.tensor(readers), keys, values))
    out = plan.run(0, query, key, value, dim**-0.5)
    worst = 0.0
    for row, (keys, values) in enumerate(seen):
        dense = _dense(query[row], keys, values)
        worst = max(worst, float((out[row] - dense).abs().max()))
    assert worst <= ATTENTION_TOLERANCE, (
        f"attention over segments is off by {worst:.2e} (kernel {kernel}, grouping {grouping})"
    )
    return worst


def _dense(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one row `[heads, dim]` over `[key heads, tokens, dim]`, in float64, written from the definition."""
    repeat = query.shape[0] // keys.shape[0]
    keys, values = keys.double().repeat_interleave(repeat, 0), values.double().repeat_interleave(repeat, 0)
    scores = (keys @ query.double().unsqueeze(-1)).squeeze(-1) * query.shape[-1] ** -0.5
    out: Tensor = (scores.softmax(-1).unsqueeze(1) @ values).squeeze(1)
    return out
