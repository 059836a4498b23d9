"""Dictation: a task for two workers that only those can solve who read each other while they write.

Alice says letters, each at most once, in an order that nobody can know beforehand (she samples them). Bob writes them
down as capitals, one step behind her: his first word is `wait`, his word t + 1 is her letter t. Both write `TOKENS`
words at the same time, so Bob has to read each letter in the step after it came to be. One who does not see Alice is
right once in 26 times, whatever he does.

A run is the prompt, and after it two workers that begin with their header. The view of a worker is the prompt, the
other's header and words, its own header and words (the *combined* layout of Hogwild! Inference, arXiv:2504.06261).
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orchestra.graph import Read, Span, ThreadGraph, View

MODEL = Path(__file__).parents[1] / "assets" / "dictation"
"""A model that was trained on it (configs/dictation.yaml)."""
LETTERS = string.ascii_lowercase
WAIT = "wait"
PROMPT = "alice says letters bob writes them down"
HEADERS = (" alice:", " bob:")
CHANCE = 1 / len(LETTERS)
"""Accuracy of a Bob who does not see Alice: her letters being equally likely, no guess is better than another."""
TOKENS = 20
"""Words of each worker in a whole run."""
STRATEGY = {
    "workers": 2,
    "names": ["alice", "bob"],
    "header": " {name}:",
    "instruct": False,
    "past": "",
    "others": "",
    "own": "",
    "step_ends": [],
    "check_every": 0,
    "finish": "",
    "ban": [],
}
"""Options of `hogwild` that make its views those of the task."""
WORDS = (*PROMPT.split(), *(header.strip() for header in HEADERS), WAIT, *LETTERS, *LETTERS.upper())


class Score(NamedTuple):
    """How well Bob followed.

    Attributes:
        right: his words that are what Alice said in the step before.
        scored: the words that could be: all but the first.
    """

    right: int
    scored: int


def score(alice: str, bob: str) -> Score:
    """Compare what the two wrote, with or without their headers."""
    said, written = (_words(text, header) for text, header in zip((alice, bob), HEADERS, strict=True))
    pairs = list(zip(said, written[1:], strict=False))
    return Score(sum(b == a.upper() for a, b in pairs), len(pairs))


def _words(text: str, header: str) -> list[str]:
    words = text.split()
    return words[1:] if words[:1] == [header.strip()] else words


def draw(source: random.Random, tokens: int = TOKENS) -> tuple[list[str], list[str]]:
    """What Alice and Bob write in one run."""
    said = source.sample(LETTERS, tokens)
    return said, [WAIT, *(letter.upper() for letter in said[:-1])]


def build_graph(
    prompt: Sequence[int], headers: Sequence[int], words: Sequence[Sequence[int]], share: bool
) -> ThreadGraph:
    """A run in lock-step: the prompt, and a node for each worker.

    Args:
        prompt: token ids.
        headers: the id of each worker's header.
        words: ids of what each worker writes.
        share: whether the workers read each other; else each reads the prompt and itself.
    """
    graph = ThreadGraph()
    graph.add(spans=[Span("prompt", list(prompt), len(prompt))])
    for i, (header, ids) in enumerate(zip(headers, words, strict=True)):
        spans = [Span("forced", [header], 1), Span("sampled", list(ids), len(ids))]
        graph.add_concurrent(waits=[0], path=[i], spans=spans)
    for me, other in ((1, 2), (2, 1)):
        # Token k reads the other's tokens up to k: those of the same step too.
        others = [Read(other, 1, 1)] if share else []
        graph.nodes[me].views = [View(0, [Read(0, len(prompt)), *others])]
    return graph
