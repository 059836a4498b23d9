"""The batches of the multilingual model's training: all behaviours, old and new, by step.

New behaviours are rows of thread graphs: what `flatten` makes of the graph that the strategy would have made. Threads
that are written again as text are merged with the branches that they came from, so they are computed once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from orchestra.evaluation.countdown import Instance, stream
from orchestra.graph import Span
from orchestra.runtime.engine import Prompt
from orchestra.runtime.openings import KEY
from orchestra.training import tokenizer
from orchestra.training.flatten import Row, flatten
from orchestra.training.graphs import graph_of
from orchestra.training.mixture import ANSWER, HIT, MISS, POOL, Mixture, Weights, cut
from orchestra.training.parallel_demonstrations import BEHAVIOURS, DRAFTS, OPENINGS, Told
from orchestra.training.tokenizer import BOS, EOS, IDS, LABELS, WORKERS
from orchestra.training.trie import merge_graph

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FAILED = re.compile(r"(\n \d+: )none(</(?:Path|Thread)>)")
LINE = IDS["\n"]
NEW = ("threads", "map_reduce", "async_think", "refine")
"""The behaviours that the first stage did not have."""
CYCLE = (
    *("spawn_join", "map_reduce", "threads", "serial", "map_reduce", "async_think"),
    *("spawn_join", "threads", "refine", "serial", "map_reduce", "async_think", "three"),
)
"""What the batches hold, in turn."""
_LABELS = frozenset(IDS[f"{label}:"] for label in range(1, LABELS + 1))
_RESULTS = frozenset((ANSWER, IDS["<RETURN>"]))
_PATHS = frozenset((IDS["<Path>"], IDS["<Thread>"]))
_JOINED = frozenset((IDS["<Conclusion>"], IDS["</Parallel>"]))
_PLANS = frozenset(IDS[tag] for tag in ("<Outline>", *(f"<FORK-{i}>" for i in range(1, WORKERS + 1))))
_PLANNED = frozenset(IDS[tag] for tag in ("</Outline>", *(f"</FORK-{i}>" for i in range(1, WORKERS + 1))))
_ENDS = frozenset(IDS[tag] for tag in ("\n", "</Thread>", "</Path>", "</RETURN>", "<eos>"))


class Words:
    """The multilingual tokenizer as `graph_of` wants it, without loading it."""

    def prompt(self, prompt: Prompt, **template: object) -> Span:
        """A prompt with the begin token."""
        assert isinstance(prompt, str)
        ids = [BOS, *tokenizer.encode(prompt)]
        return Span("prompt", ids, len(ids), prompt)

    def forced(self, text: str) -> Span:
        """Text as it stands."""
        ids = tokenizer.encode(text)
        return Span("forced", ids, len(ids), text)


WORDS = Words()


def row_of(one: Told, weights: Weights) -> Row:
    """The training row of a demonstration.

    What is forced weighs nothing. Labels and all that follows a label but searches (results, and the outline that a
    path begins with) weigh as answers do: that they are the right one's is what has to be learned.
    """
    graph = graph_of(one.prompt, one.text, one.language, WORDS, EOS, branches=one.branches)
    row = merge_graph(graph) if one.behaviour == "threads" else flatten(graph)
    given = len(graph.nodes[0].spans[0].tokens)
    for at in range(given, given + len(tokenizer.encode(one.opening))):
        row.weights[at] = 0.0
    rules = {HIT: weights.hit, MISS: weights.miss, ANSWER: weights.answer} | dict.fromkeys(_LABELS, weights.answer)
    copying = begun = planning = False
    for at, token in enumerate(row.tokens):
        if row.weights[at]:
            other = weights.plan if planning else weights.other
            row.weights[at] = weights.answer if copying else rules.get(token, other)
            if token != EOS and row.tokens[at - 1] == LINE and row.tokens[at - 2] in _JOINED:
                row.weights[at] = weights.choice
        planning = token in _PLANS or (planning and token not in _PLANNED)
        # The label of a path follows its tag and a line break; the outline goes on to the end of that line.
        begun, after = token in _PATHS or (begun and token == LINE), begun
        copying = token in _RESULTS or (after and token in _LABELS) or (copying and token not in _ENDS)
    return row


class Languages:
    """Training batches by step: a function of the seed and the step alone.

    Args:
        old: batches of serial search and spawn/join, with the budget of a batch and the loss weights.
        seed: of the new behaviours.
        levels: level names and their shares, of the new behaviours.
        longest: rows of new behaviours above this are left out.
        spelled: paths that found nothing end with `answer: none` instead of `none`.
    """

    def __init__(
        self, old: Mixture, seed: int, levels: Mapping[str, float], longest: int = 2000, spelled: bool = False
    ) -> None:
        self.old, self.seed, self.levels, self.longest, self.spelled = old, seed, dict(levels), longest, spelled
        self._pool = lru_cache(maxsize=2 * len(set(CYCLE)))(self._make_pool)

    def batch(self, step: int) -> list[Row]:
        """The batch of one optimiser step."""
        cycle, place = divmod(step, len(CYCLE))
        kind = CYCLE[place]
        index = cycle * CYCLE.count(kind) + CYCLE[:place].count(kind)
        if kind in NEW:
            return self._pool(kind, index // POOL)[index % POOL]
        return self.old.nth(kind, index)

    def _make_pool(self, kind: str, number: int) -> list[list[Row]]:
        rng = random.Random(f"languages/{self.seed}/{kind}/{number}")
        rows: list[Row] = []
        total = 0
        for instance in self._instances(rng):
            told = BEHAVIOURS[kind](instance, rng)
            if self.spelled:
                told = replace(told, text=_FAILED.sub(r"\1answer: none\2", told.text))
            row = row_of(told, self.old.weights)
            if len(row) > self.longest:
                continue
            rows.append(row)
            total += len(row)
            if total >= (POOL + 1) * self.old.tokens and len(batches := cut(rows, self.old.tokens)) >= POOL:
                break
        rng.shuffle(batches)
        return batches[:POOL]

    def _instances(self, rng: random.Random) -> Iterator[Instance]:
        streams = {level: stream(level, self.old.split, rng) for level in self.levels}
        while True:
            yield next(streams[rng.choices(list(self.levels), list(self.levels.values()))[0]])


def grow(model: PreTrainedModel, seed: int) -> None:
    """Add rows for `LANGUAGE_WORDS` and `TAGS`: the mean of the old ones, and noise of their spread, by the seed."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    old, size = model.get_input_embeddings().weight.shape[0], len(IDS)
    if old >= size:
        return
    model.resize_token_embeddings(size, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            mean, spread = table[:old].mean(0), table[:old].std(0)
            table[old:] = mean + spread * torch.randn(size - old, table.shape[1], generator=generator)


def tell_openings(folder: Path) -> None:
    """Write into a model's ``config.json`` what is forced so that it speaks a language; see `Engine.openings`."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[KEY] = {"openings": {**OPENINGS, "drafts": DRAFTS}}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
