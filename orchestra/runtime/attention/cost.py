"""Whether it pays to read a shared segment where it is, once for all readers, or to copy it in front of their tails.

A read in place costs a fixed time (another kernel call, gathering the queries) and, for each reader, a part that is
merged; copies cost what it takes to read them, in every step and for every reader.
"""

from __future__ import annotations

COPY_BYTES = 2 * 1024 * 1024
"""What is read from copies in about the fixed time of a read in place."""

MERGE_TOKENS = 24
"""What a reader reads from its copy, in tokens, in about the time that merging its part takes: at 16 tokens copies are
5 to 15 % faster for any number of readers."""


def in_place(tokens: int, readers: int, token_bytes: int, copy_bytes: int = COPY_BYTES) -> bool:
    """The cost rule.

    `COPY_BYTES` was fitted to both ways of 178 cases, measured as by `orchestra bench attention` on one core: 1 to 128
    readers of 4 to 1,024 tokens, layers of 4/4 heads of 32, 14/2 of 64 and 32/8 of 128, float32 and bfloat16. With it
    alone a layer takes 1.8 % longer (geometric mean) than with the better way of each case; with half of it 5 %.
    `MERGE_TOKENS` was added for the shortest prefixes of the grid, and not fitted together with it.

    Args:
        tokens: of the segment.
        readers: rows that read it in a step.
        token_bytes: bytes of the keys and values of a token in one layer.
        copy_bytes: see `COPY_BYTES`; 0 never copies.
    """
    return copy_bytes <= 0 or (tokens - MERGE_TOKENS) * readers * token_bytes > copy_bytes
