"""Where threads stand: context in the graph that several of them share, made when one first needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from orchestra.errors import UsageError
from orchestra.graph import Edge, Node, Span
from orchestra.run import Path, Run


@dataclass(frozen=True, slots=True)
class Later:
    """Text whose tokens are known only when it is put into the graph: an encoded prompt, copies of branches.

    Attributes:
        text: what it says.
        spans: makes its tokens, given the edges of the context that it comes after.
    """

    text: str
    spans: Callable[[list[Edge]], Awaitable[list[Span]]]


Text = str | Later


class Stem:
    """The graph context that threads stand on, made when one of them first needs it and then shared by all."""

    def __init__(self, run: Run, parents: Sequence[Stem], text: Sequence[Text], path: Path, alias: str) -> None:
        self._run, self._parents, self._text, self._path, self._alias = run, parents, text, path, alias
        self._edges: list[Edge] | None = None
        self._lock = asyncio.Lock()

    @classmethod
    def at(cls, run: Run, node: Node, length: int) -> Stem:
        """The stem that ends `length` tokens into `node`."""
        stem = cls(run, (), (), (), "")
        stem._edges = [Edge(node.id, length)]
        return stem

    async def edges(self) -> list[Edge]:
        """Context edges for what stands on this stem; the first call puts its text into the graph."""
        async with self._lock:
            if self._edges is None:
                edges = [edge for parent in self._parents for edge in await parent.edges()]
                spans = await encode(self._run, edges, self._text, self._alias)
                if spans:
                    node = self._run.settle(edges, spans, self._path, self._alias)
                    edges = [Edge(node.id, len(node))]
                self._edges = edges
        return self._edges


async def encode(run: Run, context: list[Edge], text: Sequence[Text], alias: str) -> list[Span]:
    """Token spans of `text`, each piece encoded by itself so that token boundaries do not depend on what comes next."""
    spans: list[Span] = []
    engine = run.engine_for(alias)
    for piece in text:
        if isinstance(piece, str):
            with run.waiting_for(engine):
                spans.append(await engine.encode(piece))
        else:
            spans += await piece.spans(context)
    return [span for span in spans if span.count or span.text]


def copy(run: Run, end: list[Edge], base: list[Edge]) -> list[Span]:
    """What stands between `base` and `end`, as forced spans of the same token ids, for a recompute join.

    Raises:
        UsageError: `end` does not descend from `base` by single steps.
    """
    spans: list[Span] = []
    for node, length in reversed(run.graph.lineage(*end[0]) if len(end) == 1 else []):
        if Edge(node, length) in base:
            return spans
        pieces: list[Span] = []
        for span in run.graph.nodes[node].spans:
            if span.origin == "prompt":
                raise UsageError("join takes threads that were forked from this one")
            if length > 0:  # only an end-of-sequence token is ever cut off, and it has no text
                count = min(length, span.count)
                pieces.append(Span("forced", span.tokens[:length], count, span.text))
            length -= span.count
        spans = pieces + spans
    raise UsageError("join takes threads that were forked from this one")
