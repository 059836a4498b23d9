"""Whether it pays to read a shared segment where it is, once for all readers, or to copy it in front of their tails.

A read in place costs a fixed time (another kernel call, gathering the queries, merging) and, for each reader, a part of
the output that is written and merged. Copies cost what it takes to read them, in every step and for every reader.
"""

from __future__ import annotations

COPY_BYTES = 2 * 1024 * 1024
"""What can be read from copies in the fixed time of a read in place."""

MERGE_TOKENS = 32
"""What can be read from a copy, in tokens, in the time that merging takes for a reader."""


def in_place(tokens: int, readers: int, token_bytes: int, copy_bytes: int = COPY_BYTES) -> bool:
    """The cost rule.

    The two constants were fitted to both ways of 178 cases, measured by `orchestra bench attention` on one core: 1 to
    128 readers of 4 to 1,024 tokens, layers of 4/4 heads of 32, 14/2 of 64 and 32/8 of 128, float32 and bfloat16. With
    them a layer takes 2 % longer on average (geometric mean) than with the better way of each case, and less than 17 %
    longer in 95 % of the cases.

    Args:
        tokens: of the segment.
        readers: rows that read it in a step.
        token_bytes: bytes of the keys and values of a token in one layer.
        copy_bytes: see `COPY_BYTES`; 0 never copies.
    """
    if copy_bytes <= 0:
        return True
    return readers * (tokens - MERGE_TOKENS) * token_bytes > copy_bytes
