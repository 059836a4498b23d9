"""Texts with tags as training rows: in the layout that the run asks for, and as plain text beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from orchestra.errors import OrchestraError, UsageError
from orchestra.graph import ThreadGraph
from orchestra.runtime.local.prompts import Prompts
from orchestra.training.batches import Rows
from orchestra.training.flatten import Row, flatten
from orchestra.training.graphs import graph_of
from orchestra.training.sft_config import Source, SupervisedConfig
from orchestra.training.texts import PLAIN, Example, example, read_records
from orchestra.training.trie import Unit, merge


class Renderer:
    """Makes rows of examples, in the tokens of one model.

    Args:
        tokenizer: of Hugging Face; prompts are encoded as an engine encodes them.
        config: of the run: its layout, suffixes, loss weights and longest row.
    """

    def __init__(self, tokenizer: Any, config: SupervisedConfig) -> None:
        self._prompts = Prompts(tokenizer, 1 << 40)  # what is too long is left out later
        self._eos = tokenizer.eos_token_id
        if self._eos is None:
            raise UsageError("this tokenizer has no end token: a model could never learn to stop")
        self._config = config
        self._weights = {tokenizer.convert_tokens_to_ids(token): value for token, value in config.weights.items()}
        if None in self._weights or tokenizer.unk_token_id in self._weights:
            raise UsageError(f"weights: not all of {', '.join(config.weights)} are tokens of this model")

    def graph(self, example: Example) -> ThreadGraph:
        """The thread graph of an example: what a strategy would have made of a model that says the same."""
        return graph_of(
            example.prompt,
            example.text,
            example.language,
            self._prompts,
            self._eos,
            branches=example.helpers,
            join=self._config.join,
        )

    def parallel(self, example: Example) -> Row:
        """The row of an example in its language."""
        graph = self.graph(example.suffixed(self._config.suffixes.get("parallel", "")))
        return self._weighted(flatten(graph) if self._config.layout == "graph" else merge(units(graph)))

    def plain(self, example: Example) -> Row:
        """The row of its plain text."""
        example = example.suffixed(self._config.suffixes.get("plain", ""))
        return self._weighted(flatten(self.graph(replace(example, text=example.plain, language=PLAIN, helpers=()))))

    def _weighted(self, row: Row) -> Row:
        if self._weights:
            named = self._weights
            row.weights = [w * named.get(token, 1.0) for w, token in zip(row.weights, row.tokens, strict=True)]
        return row


def units(graph: ThreadGraph) -> list[Unit]:
    """The contexts and completions of a graph whose joins recompute (ThreadWeaver, arXiv 2512.07843, section 3.3).

    The whole text as one completion comes first, so that a model learns to write it by itself too; then one unit for
    each thing that the model was asked to say.

    Raises:
        UsageError: the graph has a reuse join: what stands after it has no token string.
    """
    last = max(node.id for node in graph.nodes if node.count("sampled"))
    given = sum(span.count for span in graph.nodes[0].spans if span.origin == "prompt")
    whole = graph.path_tokens(last)
    found = [Unit(whole[:given], whole[given:])]
    for node in graph.nodes:
        place = 0
        for span in node.spans:
            if span.origin == "sampled":
                before = graph.path_tokens(node.id, place) if place or not node.context else _before(graph, node.id)
                found.append(Unit(before, span.tokens, span.weight))
            place += span.count
    return found


def _before(graph: ThreadGraph, node: int) -> list[int]:
    (edge,) = graph.nodes[node].context
    return graph.path_tokens(*edge)


def load_rows(source: Source, tokenizer: Any, config: SupervisedConfig, cache: Path) -> Rows:
    """The rows of a source; those of texts are made once, and kept in `cache`.

    Raises:
        UsageError: it cannot be read, a record of it is malformed, or none is short enough.
    """
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    records = read_records(source.path, source.split, source.revision)
    if len(records) and "input_ids" in records[0] and not source.texts:
        if config.parallel != (1.0, 1.0):
            raise UsageError(f"{source.path} holds rows, which have no plain rendering (texts: true takes its texts)")
        rows = _rows_that_fit(records, source, len(tokenizer), config.longest)
    else:
        renderer = Renderer(tokenizer, config)
        made = {"records": records, "language": source.language or config.language, "renderer": renderer}
        settings = (config.language, config.layout, config.join, config.suffixes, config.weights, config.longest)
        key = [asdict(source), settings, list(records), tokenizer.get_vocab()]
        fingerprint = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        told = made | {"path": source.path, "longest": config.longest}
        try:
            rows = Dataset.from_generator(
                _made, cache_dir=str(cache), gen_kwargs=told, features=_features(), fingerprint=fingerprint
            )
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
    if not len(rows):
        raise _empty(source.path, config.longest)
    return Rows(rows, source.share)


def _rows_that_fit(columns: Any, source: Source, vocabulary: int, longest: int) -> Any:
    short = []
    for index, row in enumerate(columns.select_columns("input_ids")):
        ids = row["input_ids"]
        if max(ids, default=0) >= vocabulary:
            theirs = f"{source.path}, row {index} has token {max(ids)}"
            raise UsageError(f"{theirs}: it is in another model's tokens (texts: true takes its texts)")
        if len(ids) <= longest:
            short.append(index)
    return columns.select(short).select_columns([name for name in Row().columns() if name in columns.column_names])


def _features() -> Any:
    """Types of the columns of both renderings; integers of 32 bits, since rows are long."""
    from datasets import Features, Sequence, Value

    whole, kinds = Value("int32"), {"echoes": Value("bool"), "loss_weights": Value("float32")}
    columns = {name: Sequence(kinds.get(name, whole)) for name in Row().columns()}
    columns["views"] = Sequence(Sequence(whole))
    return Features(columns | {f"{PLAIN}.{name}": kind for name, kind in columns.items()})


def _made(
    records: Sequence[Mapping[str, Any]], language: str, renderer: Renderer, path: str, longest: int
) -> Iterator[dict[str, Any]]:
    none = True
    for number, record in enumerate(records, 1):
        try:
            read = example(record, language)
            renderings = renderer.parallel(read), renderer.plain(read)
        except OrchestraError as error:
            raise UsageError(f"{path}, row {number}: {error}; orchestra data check tells all") from error
        if max(map(len, renderings)) <= longest:
            none = False
            row, plain = (rendering.columns() for rendering in renderings)
            yield row | {f"{PLAIN}.{name}": column for name, column in plain.items()}
    if none:
        raise _empty(path, longest)


def _empty(path: str, longest: int) -> UsageError:
    return UsageError(f"{path} has no rows of at most {longest} tokens (longest)")
