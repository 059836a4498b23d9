"""A model small enough to try everything, and laws of whole texts by enumeration: the oracle of the samplers' tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from conftest import byte_tokenizer

from orchestra.outcome import Candidate

SMALL = 6  # the vocabulary: four special tokens, of which 2 is the end of sequence, `!` and `"`
INITIAL = 0.12  # the initializer_range that makes its texts neither all alike nor all one
EOS = 2
PROMPT = '"'
Ids = tuple[int, ...]
Key = tuple[str, int]


def everything(model: Any, prompt: list[int], length: int) -> dict[Ids, list[list[float]]]:
    """Every text that ends, or has so many tokens: of each token, the log-probabilities of all that could stand there.

    By plain forwards of the whole text.
    """
    import torch

    found: dict[Ids, list[list[float]]] = {}
    heads: dict[Ids, list[list[float]]] = {(): []}
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *head] for head in heads])).logits[:, -1]
        rows = logits.double().log_softmax(-1).tolist()
        longer = {
            (*head, token): [*tables, row]
            for (head, tables), row in zip(heads.items(), rows, strict=True)
            for token in range(len(row))
        }
        found |= {ids: tables for ids, tables in longer.items() if ids[-1] == EOS}
        heads = {ids: tables for ids, tables in longer.items() if ids[-1] != EOS}
    return found | heads


def log_p(ids: Ids, tables: list[list[float]]) -> float:
    """The model's log-probability of a text."""
    return math.fsum(table[token] for token, table in zip(ids, tables, strict=True))


def log_tempered(ids: Ids, tables: list[list[float]], alpha: float) -> float:
    """The log-probability when each token is drawn from softmax(alpha log p)."""
    return math.fsum(
        alpha * table[token] - math.log(math.fsum(math.exp(alpha * value) for value in table))
        for token, table in zip(ids, tables, strict=True)
    )


def normalised(log_weights: Mapping[Any, float]) -> dict[Any, float]:
    """The law with these weights."""
    total = math.fsum(map(math.exp, log_weights.values()))
    return {key: math.exp(value) / total for key, value in log_weights.items()}


@cache
def key_of(ids: Ids) -> Key:
    """What tells a text from the others in an outcome: what it says with special tokens shown, and its length."""
    return _tokenizer().decode([token for token in ids if token != EOS]), len(ids)


@cache
def _tokenizer() -> Any:
    return byte_tokenizer()


def keyed(law: Mapping[Ids, float]) -> dict[Key, float]:
    """A law over token ids as one over what an outcome shows."""
    found = {key_of(ids): p for ids, p in law.items()}
    assert len(found) == len(law)
    return found


def shares(candidates: Iterable[Candidate]) -> dict[Key, float]:
    """The law that weighted candidates make."""
    found: dict[Key, float] = {}
    for candidate in candidates:
        key = candidate.text, candidate.tokens
        found[key] = found.get(key, 0.0) + candidate.weight
    total = math.fsum(found.values())
    return {key: weight / total for key, weight in found.items()}


def distance(one: Mapping[Any, float], other: Mapping[Any, float]) -> float:
    """Total variation."""
    return math.fsum(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys()) / 2
