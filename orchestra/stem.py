"""Where threads stand: context in the graph that several of them share, made when one first needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from orchestra.graph import Edge, Node, Span
from orchestra.run import Path, Run


class Stem:
    """The graph context that threads stand on, made when one of them first needs it and then shared by all."""

    def __init__(self, run: Run, parents: Sequence[Stem], text: Sequence[str | Span], path: Path, alias: str) -> None:
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
                spans = await encode(self._run, self._text, self._alias)
                if spans:
                    node = self._run.settle(edges, spans, self._path, self._alias)
                    edges = [Edge(node.id, len(node))]
                self._edges = edges
        return self._edges


async def encode(run: Run, text: Sequence[str | Span], alias: str) -> list[Span]:
    """Token spans of `text`, each piece encoded by itself so that token boundaries do not depend on what comes next."""
    spans = [await run.engine_for(alias).encode(piece) if isinstance(piece, str) else piece for piece in text]
    return [span for span in spans if span.count or span.text]
