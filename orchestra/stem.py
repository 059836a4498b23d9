"""Where threads stand: context in the graph that several of them share, made when one first needs it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from orchestra.errors import CapabilityError, UsageError
from orchestra.graph import Edge, Node, Span
from orchestra.run import Path, Run
from orchestra.runtime.engine import Capability


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

    @property
    def known(self) -> list[Edge]:
        """Its edges, if its text is in the graph already; else none."""
        return self._edges or []

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


class Cut(NamedTuple):
    """Where a node is left.

    Attributes:
        length: tokens of the node that remain.
        kept: the sampled text of these.
        rest: sampled text that remains, but not its tokens.
    """

    length: int
    kept: str
    rest: str


_NEIGHBOURS = 8  # tokens before a text that may change how it is decoded
_TOKENS_A_CHARACTER = 4


async def before_stop(run: Run, node: Node, stop: str | int) -> Cut:
    """Leave a node before the stop that ended it: a string, or the id of its last token.

    Raises:
        CapabilityError: the engine does not tell token ids.
    """
    sampled = _told(run, node)
    forced, last = len(node) - sampled.count, sampled.count - 1  # the last token completes the stop
    if isinstance(stop, int):
        return Cut(forced + last, await beginning(run, node, last), "")
    wanted = sampled.text.partition(stop)[0]  # all of it if a special token that is not shown is the stop
    for count in range(last, max(0, last - _TOKENS_A_CHARACTER * len(stop)), -1):
        for skip in (True, False):  # whichever way the text was told
            if wanted.startswith(kept := await beginning(run, node, count, skip=skip)):
                return Cut(forced + count, kept, wanted[len(kept) :])
    return Cut(forced, "", wanted)  # an odd text, whose tokens do not decode to it one by one


async def beginning(run: Run, node: Node, count: int, *, skip: bool = True) -> str:
    """Text of the first `count` tokens sampled into a node; without special tokens if `skip`.

    Raises:
        CapabilityError: the engine does not tell token ids.
    """
    engine, sampled = run.engine_for(node.engine), _told(run, node)
    forced = len(node) - sampled.count
    given = [edge for edge in node.context if not forced]
    before = run.graph.nodes[given[0].parent].tokens[: given[0].length] if given else node.tokens[:forced]
    before = before[-_NEIGHBOURS:]
    with run.waiting_for(engine):
        start = len(await engine.decode(before, skip_special_tokens=skip)) if before else 0
        return (await engine.decode([*before, *sampled.tokens[:count]], skip_special_tokens=skip))[start:]


def _told(run: Run, node: Node) -> Span:
    """What was sampled into a node, whose token ids are known."""
    engine, sampled = run.engine_for(node.engine), node.spans[-1]
    if Capability.CUT not in engine.capabilities or len(sampled.tokens) != sampled.count:
        raise CapabilityError(f"{engine.name} does not tell token ids; local:PATH and sglang://HOST:PORT do")
    return sampled
