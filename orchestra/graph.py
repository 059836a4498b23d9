"""The thread graph: one DAG of token runs that is at once the run, the cache, the trace and the training row.

Rules (docs/design.md): a *context* edge `(parent, length)` means that the node attends to the parent's first
`length` tokens and to everything they attend to; a *wait* edge means that the program could not go on before that
node ended. A node's first position is 1 + the largest end position over its context parents. The critical path is
the longest path over both kinds of edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from orchestra.errors import UsageError

if TYPE_CHECKING:
    import networkx

Origin = Literal["prompt", "forced", "sampled"]
Weight = Literal["sampled_tokens", "seconds"]


class Edge(NamedTuple):
    """A context edge: the first `length` tokens of node `parent`, and all that they attend to."""

    parent: int
    length: int


class Read(NamedTuple):
    """One node in a concurrent view: its first `length` tokens, and `grows` more for each token of the reader."""

    node: int
    length: int
    grows: int = 0


@dataclass(slots=True)
class View:
    """What tokens of a node read while others grow (Hogwild! Inference, arXiv:2504.06261), from token `first` on.

    Token k of the node reads `length + grows * (k - first)` tokens of each node in `reads`, and then the node's own
    tokens up to itself. They are placed one after another from position 0: the position of a key is its place in the
    reader's view, whatever it was computed at.

    Attributes:
        first: index of the first token that the view holds for; until the next view's `first`.
        reads: the nodes in the order of the view, without the node itself, which is last.
    """

    first: int
    reads: list[Read] = field(default_factory=list)

    def lengths(self, index: int) -> list[int]:
        """Tokens that token `index` reads of each node in `reads`."""
        return [read.length + read.grows * (index - self.first) for read in self.reads]


@dataclass(slots=True)
class Span:
    """A stretch of one origin inside a node.

    Attributes:
        origin: who wrote it: `prompt` (the caller), `forced` (the orchestrator), `sampled` (the model).
        tokens: token ids; empty when the engine does not tell them (`count` is always right).
        count: number of tokens.
        text: the decoded text.
        logprobs: per sampled token, the raw model's log-probability (temperature 1, nothing truncated), in nats.
        tempered: per sampled token, if asked for: its log-probability under the law that it was drawn from.
        weight: loss weight of these tokens when the graph becomes a training row.
    """

    origin: Origin
    tokens: list[int] = field(default_factory=list)
    count: int = 0
    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    tempered: list[float] = field(default_factory=list)
    weight: float = 1.0


@dataclass(slots=True)
class Node:
    """A run of tokens. It grows while its one generation runs and never changes after `finish_reason` is set.

    A *concurrent* node reads nodes that grow beside it. It has no context edges; it says in `views` what it read, which
    may be nodes that were added after it.

    Attributes:
        id: index in the graph.
        context: context edges; several only at a reuse join.
        waits: ids of nodes that had to end before this one could begin.
        start: position of the first token.
        path: fork path; with the run's seed and the position it determines the randomness.
        spans: the tokens by origin, in order.
        engine: alias of the engine that ran it; empty for the run's own.
        started, ended: seconds since the run began; None when nothing ran here.
        finish_reason: `stop`, `length`, `cancelled`, `paused`, `error`; `forced` for a node with nothing to sample.
        cached_tokens: context tokens whose keys and values an earlier request had left on the engine.
        views: of a concurrent node: what its tokens read, in order of `first`, beginning with 0.
        notes: what the engine knows besides (JSON values): of a recorded sample its `answer`, `thinking_tokens` and
            `confidence`; the number of `streams` that it was computed in, if there were several.
    """

    id: int
    context: list[Edge] = field(default_factory=list)
    waits: list[int] = field(default_factory=list)
    start: int = 0
    path: list[int] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    engine: str = ""
    started: float | None = None
    ended: float | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0
    views: list[View] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(span.count for span in self.spans)

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self)

    @property
    def tokens(self) -> list[int]:
        """All token ids in order."""
        return [token for span in self.spans for token in span.tokens]

    @property
    def origins(self) -> list[Origin]:
        """The origin of each token."""
        return [span.origin for span in self.spans for _ in range(span.count)]

    @property
    def text(self) -> str:
        """The decoded text of all spans."""
        return "".join(span.text for span in self.spans)

    def view_of(self, index: int) -> View:
        """The view that holds for a token of a concurrent node."""
        return next(view for view in reversed(self.views) if view.first <= index)

    def count(self, origin: Origin) -> int:
        """Number of tokens of one origin."""
        return sum(span.count for span in self.spans if span.origin == origin)

    @property
    def seconds(self) -> float:
        """Wall time spent generating here."""
        return self.ended - self.started if self.started is not None and self.ended is not None else 0.0

    def weight(self, by: Weight) -> float:
        """What the node adds to a path: its sampled tokens or its seconds."""
        return self.count("sampled") if by == "sampled_tokens" else self.seconds


@dataclass(slots=True)
class ThreadGraph:
    """All nodes of a run. A node's edges point only to earlier nodes, so ids are a topological order."""

    nodes: list[Node] = field(default_factory=list)

    def add(
        self,
        context: Iterable[Edge] = (),
        *,
        waits: Iterable[int] = (),
        path: Iterable[int] = (),
        spans: Iterable[Span] = (),
        engine: str = "",
    ) -> Node:
        """Append a node.

        Edges to nothing (length 0: an empty node, or a cut before its first token) are replaced by the edges that
        the parent itself had, so no later rule has to know about empty nodes.

        Raises:
            UsageError: an edge to an unknown node or beyond its end, or a node with several context parents whose
                first token would be sampled (nothing predicts it; rule 3).
        """
        edges = self._solid(context)
        spans = list(spans)
        if len(edges) > 1 and not (spans and spans[0].origin != "sampled" and spans[0].count):
            raise UsageError("a reuse join needs text: a node with several context parents begins with a forced token")
        waits = sorted(set(waits))
        for wait in waits:
            if not 0 <= wait < len(self.nodes):
                raise UsageError(f"wait edge to unknown node {wait}")
        start = max((self.nodes[edge.parent].start + edge.length for edge in edges), default=0)
        node = Node(len(self.nodes), edges, waits, start, list(path), spans, engine)
        self.nodes.append(node)
        return node

    def add_siblings(
        self, context: Iterable[Edge], *, waits: Iterable[int], paths: Iterable[Iterable[int]], engine: str = ""
    ) -> list[Node]:
        """Append empty nodes that differ in nothing but their path; at least one. See `add`."""
        first, *others = paths
        node = self.add(context, waits=waits, path=first, engine=engine)
        nodes = [node]
        for path in others:
            nodes.append(
                Node(len(self.nodes), node.context.copy(), node.waits.copy(), node.start, list(path), [], engine)
            )
            self.nodes.append(nodes[-1])
        return nodes

    def add_concurrent(self, *, waits: Iterable[int], path: Iterable[int], spans: Iterable[Span]) -> Node:
        """Append a concurrent node; its views come with its tokens.

        Raises:
            UsageError: its first token would be sampled: nothing predicts it.
        """
        node = self.add(waits=waits, path=path, spans=spans)
        if not node.spans or node.spans[0].origin == "sampled" or not node.spans[0].count:
            self.nodes.pop()
            raise UsageError("a concurrent node begins with a forced token: nothing predicts its first one")
        node.views.append(View(0))
        return node

    def _solid(self, context: Iterable[Edge]) -> list[Edge]:
        solid: dict[int, int] = {}
        for parent, length in context:
            if not 0 <= parent < len(self.nodes):
                raise UsageError(f"context edge to unknown node {parent}")
            node = self.nodes[parent]
            if node.views:
                raise UsageError(
                    f"node {parent} read nodes that grew beside it: read it by a view, or by its token ids"
                )
            if not 0 <= length <= len(node):
                raise UsageError(f"context edge takes {length} tokens of node {parent}, which has {len(node)}")
            for edge in [Edge(parent, length)] if length else node.context:
                solid[edge.parent] = max(edge.length, solid.get(edge.parent, 0))
        return [Edge(parent, length) for parent, length in solid.items()]

    def view(self, context: Iterable[Edge]) -> dict[int, int]:
        """What a token after `context` attends to: `{node id: tokens}` in order of id, closed under ancestry."""
        lengths: dict[int, int] = {}
        stack = list(context)
        while stack:
            parent, length = stack.pop()
            if length <= lengths.get(parent, 0):
                continue
            known = parent in lengths
            lengths[parent] = length
            if not known:
                stack.extend(self.nodes[parent].context)
        return dict(sorted(lengths.items()))

    def lineage(self, node: int, length: int | None = None) -> list[Edge]:
        """The chain from the root to `(node, length)`, following the one context parent of each node.

        Raises:
            UsageError: the chain passes a reuse join or a concurrent node; its cache is not the causal cache of any
                token string (rule 6).
        """
        chain: list[Edge] = []
        edge = Edge(node, len(self.nodes[node]) if length is None else length)
        while True:
            chain.append(edge)
            context = self.nodes[edge.parent].context
            if self.nodes[edge.parent].views:
                raise UsageError(f"node {edge.parent} read nodes that grew beside it; it has no token string")
            if len(context) > 1:
                raise UsageError(f"node {edge.parent} joins {len(context)} branches by reuse; it has no token string")
            if not context:
                return chain[::-1]
            edge = context[0]

    def path_tokens(self, node: int, length: int | None = None) -> list[int]:
        """Token ids from the root to `(node, length)`; see `lineage` for what it raises."""
        return [t for parent, n in self.lineage(node, length) for t in self.nodes[parent].tokens[:n]]

    def predecessors(self, node: int) -> Iterator[int]:
        """Ids of context parents and waits, each once."""
        yield from dict.fromkeys([edge.parent for edge in self.nodes[node].context] + self.nodes[node].waits)

    def critical_path(self, ends: Iterable[int] | None = None, by: Weight = "sampled_tokens") -> list[int]:
        """The heaviest path over context and wait edges that ends in one of `ends` (default: any node).

        A context edge counts the whole parent: even a branch that leaves in the middle was made after it.
        That is exact when the parent had ended, and an upper bound for a cut into a node that was still growing.

        Returns:
            Node ids from first to last; empty for an empty graph.
        """
        best: list[float] = []
        came: list[int | None] = []
        for node in self.nodes:
            prior = max(self.predecessors(node.id), key=lambda p: best[p], default=None)
            best.append(node.weight(by) + (best[prior] if prior is not None else 0.0))
            came.append(prior)
        last: int | None = max(range(len(best)) if ends is None else ends, key=lambda p: best[p], default=None)
        path: list[int] = []
        while last is not None:
            path.append(last)
            last = came[last]
        return path[::-1]

    def critical_path_length(self, ends: Iterable[int] | None = None, by: Weight = "sampled_tokens") -> float:
        """Weight of the critical path: sampled tokens, or seconds."""
        return sum(self.nodes[i].weight(by) for i in self.critical_path(ends, by))

    def count(self, origin: Origin) -> int:
        """Number of tokens of one origin in the whole graph."""
        return sum(node.count(origin) for node in self.nodes)

    def to_networkx(self) -> networkx.MultiDiGraph:
        """The graph as a networkx view: edges run forward in time with `kind` `context` or `wait`."""
        import networkx

        view: networkx.MultiDiGraph = networkx.MultiDiGraph()
        for node in self.nodes:
            view.add_node(
                node.id,
                tokens=len(node),
                sampled_tokens=node.count("sampled"),
                seconds=node.seconds,
                start=node.start,
                text=node.text,
                finish_reason=node.finish_reason,
            )
            for parent, length in node.context:
                view.add_edge(parent, node.id, kind="context", length=length)
            for parent in node.waits:
                view.add_edge(parent, node.id, kind="wait")
        return view

    def to_json(self) -> str:
        """JSON that `from_json` reads back to an equal graph."""
        data: bytes = _adapter().dump_json(self, exclude_defaults=True)
        return data.decode()

    @classmethod
    def from_json(cls, data: str | bytes) -> ThreadGraph:
        """Read `to_json`'s form.

        Raises:
            UsageError: not such JSON, or edges that break the rules of the graph.
        """
        from pydantic import ValidationError

        try:
            graph: ThreadGraph = _adapter().validate_json(data)
        except ValidationError as error:
            raise UsageError(f"not a thread graph: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from error
        graph.check_integrity()
        return graph

    def check_integrity(self) -> None:
        """Check the rules on every node.

        Raises:
            UsageError: the first rule that is broken, with its node.
        """
        for i, node in enumerate(self.nodes):
            where = f"node {i}"
            if node.id != i:
                raise UsageError(f"{where} has id {node.id}")
            if any(not 0 <= p < i for p in self.predecessors(i)):
                raise UsageError(f"{where} has an edge to itself, a later node or none")
            if any(not 1 <= e.length <= len(self.nodes[e.parent]) for e in node.context):
                raise UsageError(f"{where} takes more tokens of a parent than it has, or none")
            if node.start != max((self.nodes[e.parent].start + e.length for e in node.context), default=0):
                raise UsageError(f"{where} starts at {node.start}, not after its longest parent")
            if len(node.context) > 1 and (not node.spans or node.spans[0].origin == "sampled"):
                raise UsageError(f"{where} joins several parents and begins with a sampled token")
            self._check_views(node)
            if any(self.nodes[edge.parent].views for edge in node.context):
                raise UsageError(f"{where} has a context edge to a concurrent node")
            for span in node.spans:
                if span.tokens and len(span.tokens) != span.count:
                    raise UsageError(f"{where} has a span of {span.count} tokens with {len(span.tokens)} ids")
                if span.logprobs and len(span.logprobs) != span.count:
                    raise UsageError(
                        f"{where} has a span of {span.count} tokens, {len(span.logprobs)} log-probabilities"
                    )

    def _check_views(self, node: Node) -> None:
        firsts = [view.first for view in node.views]
        if not firsts:
            return
        if node.context:
            raise UsageError(f"node {node.id} has context edges and views; it can have one of them")
        if firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise UsageError(f"the views of node {node.id} begin with tokens {firsts}, not with 0 and rising")
        for view, end in zip(node.views, [*firsts[1:], len(node)], strict=True):
            for read, last in zip(view.reads, view.lengths(max(view.first, end - 1)), strict=True):
                if not 0 <= read.node < len(self.nodes) or read.node == node.id:
                    raise UsageError(f"node {node.id} reads node {read.node}, which is itself or none")
                if min(read.length, last) < 0 or max(read.length, last) > len(self.nodes[read.node]):
                    raise UsageError(f"node {node.id} reads more tokens of node {read.node} than it has")


def _adapter() -> Any:
    # pydantic is imported late: building the adapter costs more than the rest of this module.
    from pydantic import TypeAdapter

    global _ADAPTER
    if _ADAPTER is None:
        _ADAPTER = TypeAdapter(ThreadGraph)
    return _ADAPTER


_ADAPTER: Any = None
