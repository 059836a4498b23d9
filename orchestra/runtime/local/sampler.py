"""Drawing tokens by Gumbel-max: `argmax(log p / T + noise)`, where the noise is a pure function.

The noise of vocabulary entry v at a position depends on (seed, fork path, position, v) and nothing else, so what else
is in the batch, the order of arrival or the number of steps cannot change a result. It is SplitMix64 (Steele et al.
2014) used as a counter: the state begins at a hash of (seed, path), jumps by position, then by v.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestra.runtime.local.steering import Steering
from orchestra.runtime.sampling import Sampling

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_POSITION = np.uint64(0xD1342543DE82EF95)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31 = (np.uint64(n) for n in (30, 27, 31))
# Numbers that stay in the processor's cache: a large vocabulary times batch would go through memory ten times.
_BLOCK = 32768
_SORTED = 1024  # vocabularies that are sorted as they are
_STEEPEST = 1e30  # so that no product is infinite
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


@lru_cache(maxsize=8)
def _steps(vocabulary: int) -> Words:
    with np.errstate(over="ignore"):
        return np.arange(1, vocabulary + 1, dtype=np.uint64) * _GOLDEN


def gumbel(keys: Words, positions: Ints, vocabulary: int) -> Floats:
    """Standard Gumbel noise.

    Args:
        keys: `noise_key` of each row, `[rows]`.
        positions: position of the token to be drawn, `[rows]`.
        vocabulary: number of entries.

    Returns:
        `[rows, vocabulary]`; each row is a function of its key and position only.
    """
    noise = np.empty((len(keys), vocabulary), np.float32)
    with np.errstate(over="ignore"):
        states = _states(keys, positions)
        steps = _steps(vocabulary)
        block = max(1, _BLOCK // vocabulary)
        for i in range(0, len(keys), block):
            noise[i : i + block] = _gumbel(states[i : i + block, None] + steps)
    return noise


def gumbel_of(keys: Words, positions: Ints, ids: Sequence[Ints]) -> list[Floats]:
    """The entries `ids[row]` of each row of `gumbel`, and no others: after truncation there are few."""
    counts = [len(some) for some in ids]
    flat = np.concatenate(ids).astype(np.uint64)
    noise = np.empty(len(flat), np.float32)
    with np.errstate(over="ignore"):
        states = np.repeat(_states(keys, positions), counts)
        for i in range(0, len(flat), _BLOCK):
            part = slice(i, i + _BLOCK)
            noise[part] = _gumbel(states[part] + (flat[part] + np.uint64(1)) * _GOLDEN)
    return np.split(noise, np.cumsum(counts[:-1]))


def _states(keys: Words, positions: Ints) -> Words:
    return _mix(keys + (positions.astype(np.uint64) + np.uint64(1)) * _POSITION)


def _gumbel(words: Words) -> Floats:
    """Noise from counters, which it overwrites."""
    # Through log1p, small numbers keep their precision: they are the large noise, which decides.
    uniform = (_mix(words).astype(np.float32) * np.float32(2.0**-64)).clip(_LEAST, _MOST)
    noise: Floats = -np.log(-np.log1p(-uniform))
    return noise


class Drawn(NamedTuple):
    """One token per row, its raw log-probability (nats), and what rows asked for besides.

    A token is -1 where its row's `Steering` leaves none.

    Attributes:
        top: the alternatives of each row.
        tempered: log-probability under the law that it was drawn from; nan for rows that did not ask.
    """

    tokens: list[int]
    logprobs: list[float]
    top: list[Mapping[int, float]] | None
    tempered: list[float] | None


class Batch:
    """The sampling parameters of a fixed list of rows, as arrays; made again only when the list changes.

    Args:
        samplings, keys: of each row.
        steerings: what changes a row's logits; none for all rows by default.

    Attributes:
        counts: some rows' exponents depend on how many tokens they have sampled.
        warm: rows that are drawn from all of their own distribution, together.
        single: rows that are truncated or steered, one by one.
    """

    def __init__(
        self, samplings: Sequence[Sampling], keys: Sequence[int], steerings: Sequence[Steering | None] = ()
    ) -> None:
        self._samplings, self._keys = samplings, keys
        self.single: list[tuple[int, Steering | None]] = []
        warm = []
        for row, (sampling, steering) in enumerate(zip_longest(samplings, steerings)):
            truncated = sampling.top_k or sampling.top_p < 1 or sampling.min_p
            drawn = sampling.power(0) < math.inf
            if steering is not None or (truncated and drawn):
                self.single.append((row, steering))
            elif drawn:
                warm.append(row)
        self.warm = np.array(warm, np.int64)
        self._power = np.array([min(samplings[row].power(0), _STEEPEST) for row in warm], np.float32)[:, None]
        self._ramps = [(i, row) for i, row in enumerate(warm) if len(samplings[row].powers) > 1]
        self.counts = any(len(sampling.powers) > 1 for sampling in samplings)
        self.tempered = np.flatnonzero([sampling.tempered for sampling in samplings])
        self.keys = np.array([keys[row] for row in warm], np.uint64)
        self.alternatives = [s.top_logprobs for s in samplings]
        self.most = max(self.alternatives, default=0)

    def draw(self, logits: Tensor, positions: Ints, counts: Sequence[int] = ()) -> Drawn:
        """Draw one token per row.

        Args:
            logits: `[rows, vocabulary]`.
            positions: position of the token to be drawn, `[rows]`.
            counts: tokens that the row's generation has sampled, `[rows]`; those with `powers` need it.
        """
        for i, row in self._ramps:
            self._power[i] = self._samplings[row].power(counts[row])
        raw = logits.float().log_softmax(-1)
        table: Floats = raw.cpu().numpy()
        tokens = table.argmax(-1)  # numpy's argmax: the lowest id on ties
        tempered = np.zeros(len(table), np.float32) if len(self.tempered) else None  # what is greedy is certain
        if len(self.warm):
            scores = (table if len(self.warm) == len(table) else table[self.warm]) * self._power
            normaliser = None if tempered is None else _log_sum(scores)
            noise = gumbel(self.keys, positions[self.warm], table.shape[1])
            noise += scores
            tokens[self.warm] = drawn = noise.argmax(-1)
            if tempered is not None:
                tempered[self.warm] = scores[np.arange(len(drawn)), drawn] - normaliser
        if self.single:
            self._draw_single(logits, table, positions, counts, tokens, tempered)
        top: list[Mapping[int, float]] | None = None
        if self.most:
            best = raw.topk(min(self.most, raw.shape[1]), -1)
            ids, values = best.indices.tolist(), best.values.tolist()
            top = [dict(zip(i[:n], v[:n], strict=True)) for i, v, n in zip(ids, values, self.alternatives, strict=True)]
        logprobs = table[np.arange(len(table)), tokens].tolist()
        return Drawn(tokens.tolist(), logprobs, top, None if tempered is None else tempered.tolist())

    def _draw_single(
        self,
        logits: Tensor,
        table: Floats,
        positions: Ints,
        counts: Sequence[int],
        tokens: Ints,
        tempered: Floats | None,
    ) -> None:
        """Draw the `single` rows into `tokens`, -1 where nothing is left, and `tempered`."""
        rows, ids, values = [], [], []
        for row, steering in self.single:
            scores, power = table[row], self._samplings[row].power(counts[row] if counts else 0)
            if steering is not None:
                # The repetition penalty sees logits, not log-probabilities: it is not the same after a shift.
                scores = steering.apply(logits[row].float().cpu().numpy())
                best = int(scores.argmax())
                tokens[row] = best if scores[best] > -np.inf else -1
                if power == math.inf or tokens[row] < 0:
                    continue
                scores -= scores[best]  # so that a small temperature does not take them out of float32
            scores = scores * np.float32(min(power, _STEEPEST))
            rows.append(row)
            ids.append(kept(scores, self._samplings[row]))
            values.append(scores[ids[-1]])
        if rows:
            keys = np.array([self._keys[row] for row in rows], np.uint64)
            for row, some, value, noise in zip(rows, ids, values, gumbel_of(keys, positions[rows], ids), strict=True):
                chosen = (value + noise).argmax()
                tokens[row] = some[chosen]
                if tempered is not None:
                    tempered[row] = value[chosen] - _log_sum(value)


def _log_sum(scores: Floats) -> Floats:
    """The log of the sum of exponentials over the last dimension."""
    best = scores.max(-1)
    total: Floats = np.log(np.exp(scores - best[..., None]).sum(-1)) + best
    return total


def kept(scores: Floats, sampling: Sampling) -> Ints:
    """What truncation leaves of a distribution: top-k, then top-p, then min-p, each on what the one before left.

    Ties go to the lower id, as in greedy decoding, so exactly k entries stay.

    Args:
        scores: log-probabilities divided by the temperature, up to a constant, `[vocabulary]`; one is finite.
        sampling: what to cut.

    Returns:
        Ids, ascending. Entries of minus infinity may be among them.
    """
    if not (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
        return np.flatnonzero(scores > -np.inf)
    pool, total = (None, None) if len(scores) <= _SORTED else _pool(scores, sampling)
    order = np.argsort(-scores, kind="stable") if pool is None else pool[np.argsort(-scores[pool], kind="stable")]
    if sampling.top_k:
        order = order[: sampling.top_k]
    chances = np.exp(scores[order].astype(np.float64) - scores[order[0]])
    if sampling.top_p < 1:
        chances /= total or chances.sum()
        before = np.cumsum(chances) - chances  # the entry that crosses top_p stays; the first always does
        order = order[: max(1, int(np.count_nonzero(before < sampling.top_p)))]
        chances = chances[: len(order)]
    if sampling.min_p:
        order = order[chances >= sampling.min_p * chances[0]]
    order.sort()
    return order


def _pool(scores: Floats, sampling: Sampling) -> tuple[Ints, float | None]:
    """Of a large vocabulary, the entries that may stay, so that not all of it has to be sorted.

    Returns:
        Ids, ascending; and the sum of all chances relative to the likeliest, if top-p goes by it.
    """
    if 0 < sampling.top_k < len(scores):
        return np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k]), None
    chances = np.exp(scores.astype(np.float64) - scores.max())
    total = float(chances.sum())
    # What is below (1 - p) / n adds up to less than 1 - p, so the rest reaches p without it. A hair less for rounding.
    least = max((1 - sampling.top_p) * total / len(scores), sampling.min_p) * (1 - 1e-9)
    return np.flatnonzero(chances >= least), total


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probability (nats) of one token per row of logits `[rows, vocabulary]`."""
    chosen = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    found: list[float] = logits.float().log_softmax(-1).gather(1, chosen).squeeze(1).tolist()
    return found
