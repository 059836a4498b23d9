"""The law of losslessness: attention over segments is attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION_TOLERANCE = 1e-5


def check_losslessness(
    seed: int,
    *,
    kernel: str = "auto",
    grouping: bool = True,
    heads: int = 4,
    key_heads: int = 2,
    dim: int = 8,
    window: int | None = None,
    softcap: float | None = None,
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
        window: positions that a query sees, its own included; with grouping only.
        softcap: of the scores.

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

    def stretch(start: int, n: int) -> Tensor:
        return torch.arange(start, start + n)

    # Keys and values `[1, key heads, tokens, dim]`, and the position of the first.
    sizes = [number(1, 40) for _ in range(4)]
    segments = [(normal(1, key_heads, n, dim), normal(1, key_heads, n, dim), number(0, 60)) for n in sizes]
    slots, capacity, chunk, echoes = number(1, 5), 192, number(1, 6), number(0, 3)
    rows = slots + chunk + echoes
    query, key, value = normal(rows, heads, dim) * 2, normal(rows, key_heads, dim), normal(rows, key_heads, dim)
    reads = [[i for i in range(4) if number(0, 1)] for _ in range(slots)]
    chunk_reads = [i for i in range(4) if number(0, 1)]
    echo_reads = [[number(0, 3)] for _ in range(echoes)]
    # Per row the keys, values and positions that it sees, put together densely.
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    positions = torch.zeros(rows, dtype=torch.int64)

    def see(row: int, parts: list[tuple[Tensor, Tensor, Tensor]]) -> None:
        keys, values, at = zip(*parts, strict=True)
        seen.append((torch.cat(keys, 1), torch.cat(values, 1), torch.cat(at)))

    def segment(i: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, start = segments[i]
        return keys[0], values[0], stretch(start, keys.shape[2])

    def new(a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        return key[a:b].transpose(0, 1), value[a:b].transpose(0, 1), positions[a:b]

    plan = Plan(rows, kernel=kernel, positions=positions)  # type: ignore[arg-type]  # a plain str here
    arena = torch.zeros(2, 1, slots, key_heads, capacity, dim)
    used = []
    for slot in range(slots):
        start, own = number(0, 100), number(0, 20)
        past = normal(key_heads, own, dim), normal(key_heads, own, dim), stretch(start, own)
        positions[slot] = start + own
        copies = [segment(i) for i in reads[slot]]
        parts = [past] if grouping else [*copies, past]
        n = 0
        for keys, values, at in parts:
            arena[0, 0, slot, :, n : n + len(at)], arena[1, 0, slot, :, n : n + len(at)] = keys, values
            n += len(at)
        used.append(n + 1)
        see(slot, [*copies, past, new(slot, slot + 1)])
    plan.tails.append(Tails.over(0, arena[0], arena[1], torch.tensor(used), max(used)))
    before, start = number(0, 9), number(0, 100)
    grown = normal(2, 1, key_heads, before + chunk, dim)
    old = grown[0, 0, :, :before].clone(), grown[1, 0, :, :before].clone(), stretch(start, before)
    positions[slots : slots + chunk] = stretch(start + before, chunk)
    plan.writes.append(Write(slots, slots + chunk, grown[0][:, :, before:], grown[1][:, :, before:]))
    plan.chunks.append(Chunk.over(slots, slots + chunk, grown[0], grown[1]))
    for i in range(chunk):
        see(slots + i, [*(segment(s) for s in chunk_reads), old, new(slots, slots + i + 1)])
    for e, found in enumerate(echo_reads):
        keys, _, first = segments[found[0]]
        positions[slots + chunk + e] = first + keys.shape[2] - 1  # an echo of the last token: it sees itself
        see(slots + chunk + e, [segment(s) for s in found])
    for i, (keys, values, first) in enumerate(segments):
        readers = [slot for slot in range(slots) if grouping and i in reads[slot]]
        readers += range(slots, slots + chunk) if i in chunk_reads else []
        readers += [slots + chunk + e for e in range(echoes) if i in echo_reads[e]]
        if readers:
            plan.shared.append(Shared(torch.tensor(readers), keys, values, ((first, keys.shape[2]),)))
    out = plan.run(0, query, key, value, dim**-0.5, window=window, softcap=softcap)
    worst = 0.0
    for row, (keys, values, at) in enumerate(seen):
        visible = slice(None) if window is None else positions[row] - at < window
        dense = _dense(query[row], keys[:, visible], values[:, visible], softcap)
        worst = max(worst, float((out[row] - dense).abs().max()))
    assert worst <= ATTENTION_TOLERANCE, (
        f"attention over segments is off by {worst:.2e} (kernel {kernel}, grouping {grouping}, window {window}, "
        f"softcap {softcap})"
    )
    return worst


def _dense(query: Tensor, keys: Tensor, values: Tensor, softcap: float | None) -> Tensor:
    """Attention of one row `[heads, dim]` over `[key heads, tokens, dim]`, in float64, written from the definition."""
    repeat = query.shape[0] // keys.shape[0]
    keys, values = keys.double().repeat_interleave(repeat, 0), values.double().repeat_interleave(repeat, 0)
    scores = (keys @ query.double().unsqueeze(-1)).squeeze(-1) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    out: Tensor = (scores.softmax(-1).unsqueeze(1) @ values).squeeze(1)
    return out
