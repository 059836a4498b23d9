"""Drawing tokens by Gumbel-max: `argmax(log p / T + noise)`, where the noise is a pure function.

The noise of vocabulary entry v at a position depends on (seed, fork path, position, v) and nothing else, so what else
is in the batch, the order of arrival or the number of steps cannot change a result. It is SplitMix64 (Steele et al.
2014) used as a counter: the state begins at a hash of (seed, path), jumps by position, then by v.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestra.runtime.engine import Sampling

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_POSITION = np.uint64(0xD1342543DE82EF95)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = (np.uint64(n) for n in (30, 27, 31))
_LEAST, _MOST = np.float32(2.0**-65), np.float32(1 - 2.0**-24)


def noise_key(seed: int, path: Sequence[int]) -> int:
    """The 64-bit key of a thread's noise."""
    text = f"{seed}:{','.join(map(str, path))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(words: Words) -> Words:
    """SplitMix64's finaliser, in place."""
    words ^= words >> _S30
    words *= _MIX_1
    words ^= words >> _S27
    words *= _MIX_2
    words ^= words >> _S31
    return words


def gumbel(keys: Words, positions: Ints, vocabulary: int) -> Floats:
    """Standard Gumbel noise.

    Args:
        keys: `noise_key` of each row, `[rows]`.
        positions: position of the token to be drawn, `[rows]`.
        vocabulary: number of entries.

    Returns:
        `[rows, vocabulary]`; each row is a function of its key and position only.
    """
    with np.errstate(over="ignore"):
        states = _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _POSITION)
        steps = np.arange(1, vocabulary + 1, dtype=np.uint64) * _GOLDEN
        noise = np.empty((len(keys), vocabulary), np.float32)
        # Blocks stay in the processor's cache: a large vocabulary times batch would go through memory ten times.
        block = max(1, 32768 // vocabulary)
        for i in range(0, len(keys), block):
            words = _mix(states[i : i + block, None] + steps)
            # Through log1p, small numbers keep their precision: they are the large noise, which decides.
            uniform = (words.astype(np.float32) * np.float32(2.0**-64)).clip(_LEAST, _MOST)
            noise[i : i + block] = -np.log(-np.log1p(-uniform))
    return noise


class Drawn(NamedTuple):
    """One token per row, its raw log-probability (nats), and the alternatives of rows that asked for them."""

    tokens: list[int]
    logprobs: list[float]
    top: list[Mapping[int, float]] | None


class Batch:
    """The sampling parameters of a fixed list of rows, as arrays; made again only when the list changes."""

    def __init__(self, samplings: Sequence[Sampling], keys: Sequence[int]) -> None:
        temperature = np.array([s.temperature for s in samplings], np.float32)
        self.warm = np.flatnonzero(temperature > 0)
        chosen = [samplings[i] for i in self.warm.tolist()]
        self.temperature = temperature[self.warm, None]
        self.keys = np.array([keys[i] for i in self.warm.tolist()], np.uint64)
        self.truncated = [(i, s) for i, s in enumerate(chosen) if s.top_k or s.top_p < 1 or s.min_p]
        self.alternatives = [s.top_logprobs for s in samplings]
        self.most = max(self.alternatives, default=0)

    def draw(self, logits: Tensor, positions: Ints) -> Drawn:
        """Draw one token per row.

        Args:
            logits: `[rows, vocabulary]`.
            positions: position of the token to be drawn, `[rows]`.
        """
        raw = logits.float().log_softmax(-1)
        table: Floats = raw.cpu().numpy()
        tokens = table.argmax(-1)  # numpy's argmax: the lowest id on ties
        if len(self.warm):
            scores = (table if len(self.warm) == len(table) else table[self.warm]) / self.temperature
            for row, sampling in self.truncated:
                scores[row] = truncate(scores[row], sampling)
            scores += gumbel(self.keys, positions[self.warm], table.shape[1])
            tokens[self.warm] = scores.argmax(-1)
        top: list[Mapping[int, float]] | None = None
        if self.most:
            best = raw.topk(min(self.most, raw.shape[1]), -1)
            ids, values = best.indices.tolist(), best.values.tolist()
            top = [dict(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids, values, self.alternatives, strict=True)]
        return Drawn(tokens.tolist(), table[np.arange(len(table)), tokens].tolist(), top)


def truncate(scores: Floats, sampling: Sampling) -> Floats:
    """Cut the tail of a distribution: top-k, then top-p, then min-p, each on what the one before left.

    Ties go to the lower id, as in greedy decoding, so exactly k entries stay.

    Args:
        scores: log-probabilities divided by the temperature, up to a constant, `[vocabulary]`.
        sampling: what to cut.

    Returns:
        The scores with minus infinity for what was cut.
    """
    order = np.argsort(-scores, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    chances = np.exp(scores[kept].astype(np.float64) - scores[kept[0]])
    if sampling.top_p < 1:
        chances /= chances.sum()
        before = np.cumsum(chances) - chances  # the entry that crosses top_p stays; the first always does
        kept = kept[: max(1, int(np.count_nonzero(before < sampling.top_p)))]
        chances = chances[: len(kept)]
    if sampling.min_p:
        kept = kept[chances >= sampling.min_p * chances[0]]
    cut = np.full_like(scores, -np.inf)
    cut[kept] = scores[kept]
    return cut


def check(sampling: Sampling) -> str | None:
    """What is wrong with the parameters, or None."""
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        return f"max_tokens must be at least 1, got {sampling.max_tokens}"
    if not sampling.temperature >= 0 or sampling.temperature == float("inf"):
        return f"temperature must be 0 or more, got {sampling.temperature}"
    if sampling.top_k < 0:
        return f"top_k must be 0 (off) or more, got {sampling.top_k}"
    if not 0 < sampling.top_p <= 1:
        return f"top_p must be above 0 and at most 1, got {sampling.top_p}"
    if not 0 <= sampling.min_p <= 1:
        return f"min_p must be between 0 and 1, got {sampling.min_p}"
    if sampling.top_logprobs < 0:
        return f"top_logprobs must be 0 or more, got {sampling.top_logprobs}"
    if any(not stop for stop in sampling.stop):
        return "an empty stop string would end every generation at once"
    return None


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probability (nats) of one token per row of logits `[rows, vocabulary]`."""
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    found: list[float] = logits.float().log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
    return found
