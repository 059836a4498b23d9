"""Checks and counts of demonstrations: what is wrong with each row and where, and how parallel they are together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from orchestra.errors import OrchestraError
from orchestra.graph import Span, ThreadGraph
from orchestra.protocols import PROTOCOLS
from orchestra.protocols.apr import Round, Search
from orchestra.protocols.async_think import Organised, Task
from orchestra.protocols.document import Document
from orchestra.runtime.engine import Prompt
from orchestra.training.flatten import flatten
from orchestra.training.graphs import Encoder, graph_of
from orchestra.training.texts import PLAIN, Example, example, record_of


class Finding(NamedTuple):
    """What is wrong with a row.

    Attributes:
        row: number of the row, from 1; of a JSONL file, of the line.
        place: `line:column` in the demonstration, both from 1; empty where it is about no place in it.
        message: what is wrong.
    """

    row: int
    place: str
    message: str

    def __str__(self) -> str:
        return f"row {self.row}" + (f", {self.place}" if self.place else "") + f": {self.message}"


@dataclass
class Counts:
    """What rows hold together.

    Attributes:
        rows: rows without a finding.
        parallel: those that fork.
        blocks: how often threads are asked for.
        threads: how many.
        total: tokens that the model writes, over all threads, by row.
        longest: tokens on the critical path, by row.
        beside: tokens that are written while others are, by row.
        lengths: tokens of the training row, what is given and echoes included.
    """

    rows: int = 0
    parallel: int = 0
    blocks: int = 0
    threads: int = 0
    total: list[int] = field(default_factory=list)
    longest: list[int] = field(default_factory=list)
    beside: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def table(self, unit: str) -> list[tuple[str, str]]:
        """Names and values, as in ThreadWeaver's table of its data (arXiv 2512.07843)."""
        mean = max(self.rows, 1)
        total, longest = sum(self.total), sum(self.longest)
        return [
            ("rows", f"{self.rows:,}"),
            ("rows that fork", f"{self.parallel:,}"),
            ("blocks a row", f"{self.blocks / mean:.2f}"),
            ("threads a block", f"{self.threads / max(self.blocks, 1):.2f}"),
            ("parallel ratio", f"{sum(self.beside) / max(total, 1):.2f}"),
            (f"longest path, {unit}", f"{longest / mean:,.0f}"),
            (f"total, {unit}", f"{total / mean:,.0f}"),
            ("total / longest", f"{total / max(longest, 1):.2f}"),
            (f"longest training row, {unit}", f"{max(self.lengths, default=0):,}"),
        ]


class Words:
    """Counts words and signs where there is no tokenizer; see `Encoder`."""

    def prompt(self, prompt: Prompt, **_: Any) -> Span:
        """Words of a prompt; of messages, of all of them."""
        text = prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)
        return self.forced(text or "-")

    def forced(self, text: str) -> Span:
        """Words of a text."""
        count = len(re.findall(r"\w+|[^\w\s]", text))
        return Span("forced", [0] * count, count, text)


def check(
    records: Iterable[tuple[int, Mapping[str, Any] | str]],
    counts: Counts,
    *,
    language: str = PLAIN,
    encoder: Encoder | None = None,
    eos: int = 0,
    longest: int | None = None,
) -> Iterator[Finding]:
    """Check rows one by one; a row with a finding is not counted.

    Args:
        records: rows, or lines of JSONL, with their numbers.
        counts: grows by the rows that are right.
        language: of rows that do not say.
        encoder: of the model; default: words are counted.
        eos: the model's end token.
        longest: most tokens of a training row.
    """
    for number, record in records:
        try:
            read = example(record_of(record) if isinstance(record, str) else record, language)
        except OrchestraError as error:
            yield Finding(number, "", str(error))
            continue
        try:
            graph = graph_of(read.prompt, read.text, read.language, encoder or Words(), eos, branches=read.helpers)
        except OrchestraError as error:
            problems = [] if read.language == PLAIN else PROTOCOLS[read.language].validate(read.text)
            yield from (Finding(number, str(problem.at), problem.message) for problem in problems)
            if not problems:
                yield Finding(number, "", str(error))
            continue
        length = len(flatten(graph))
        if longest is not None and length > longest:
            yield Finding(number, "", f"its training row has {length} tokens, more than {longest}")
            continue
        _count(counts, read, graph, length)


def _count(counts: Counts, read: Example, graph: ThreadGraph, length: int) -> None:
    forks = _forks(read)
    counts.rows += 1
    counts.parallel += bool(forks)
    counts.blocks += len(forks)
    counts.threads += sum(forks)
    counts.total.append(graph.count("sampled"))
    counts.longest.append(int(graph.critical_path_length()))
    counts.beside.append(sum(graph.nodes[node].count("sampled") for node in concurrent(graph)))
    counts.lengths.append(length)


def _forks(read: Example) -> list[int]:
    """How many threads are asked for each time."""
    if read.language == PLAIN:
        return []
    document = PROTOCOLS[read.language].parse(read.text)
    if isinstance(document, Document):
        return [len(block.paths) for block in document.blocks if block.paths]
    if isinstance(document, Search):
        return [len(part.spawned) for part in document.parts if isinstance(part, Round)]
    assert isinstance(document, Organised)
    tasks = sum(isinstance(part, Task) for part in document.parts)
    return [tasks] if tasks else []


def concurrent(graph: ThreadGraph) -> list[int]:
    """Nodes that can be written while another is: those that neither come before nor after all others."""
    before: list[set[int]] = []
    for node in graph.nodes:
        known = set(graph.predecessors(node.id))
        before.append(known.union(*(before[other] for other in known)))
    written = [node.id for node in graph.nodes if node.count("sampled")]
    return [one for one in written if any(one != o and one not in before[o] and o not in before[one] for o in written)]
