"""One run: its graph, what its program has waited for, its budgets, and the one place where tokens are generated.

Two context variables follow the program through its tasks. The *frontier* is the set of nodes whose end the current
task has awaited; a new node waits for them, which makes the critical path right for any program without its author
drawing an edge. The *scope* is the innermost strategy at work; it counts nodes and enforces a budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from orchestra.answers import Extractor, extract_answer
from orchestra.budget import Budget, Ledger, Reservation
from orchestra.chains import Chains
from orchestra.concurrency import first_error, uninterrupted
from orchestra.errors import BudgetExceeded, CapabilityError, UsageError, one_of
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime.engine import Capability, Delta, Engine, Gang, Prompt, Request, Sampling, Stream

if TYPE_CHECKING:
    from orchestra.outcome import Candidate, Outcome

T = TypeVar("T")
Path = tuple[int, ...]
Watch = Callable[[Delta], bool]

frontier: ContextVar[frozenset[int]] = ContextVar("orchestra_frontier", default=frozenset())
current_scope: ContextVar[Scope | None] = ContextVar("orchestra_scope", default=None)


def scope() -> Scope:
    """The innermost strategy at work.

    Raises:
        UsageError: threads are used outside the strategy that they were given to.
    """
    if (innermost := current_scope.get()) is None:
        raise UsageError("threads live inside a running strategy: use connection.run(strategy, prompt)")
    return innermost


@dataclass(slots=True)
class Event:
    """Something that happened in a run, in order.

    Attributes:
        kind: `start` of a node, `token`s added to it, its `end`, or the `outcome` of the run (last).
        node: the node's id; -1 for the outcome.
        path: fork path of its thread.
        text: the forced text at the start, or what was decoded since the last event.
        after: at the start, the nodes it came after (context parents and waits).
        finish_reason: at the end.
        outcome: with the outcome.
        beside: the node grows beside others that read it; its path without the last index is the worker's.
    """

    kind: Literal["start", "token", "end", "outcome"]
    node: int = -1
    path: Path = ()
    text: str = ""
    after: tuple[int, ...] = ()
    finish_reason: str | None = None
    outcome: Outcome | None = None
    beside: bool = False


class Generated(NamedTuple):
    """A finished generation.

    Attributes:
        node: where its tokens are.
        length: tokens of the node that a continuation attends to (all but an end-of-sequence token).
        matched: the stop string or id that ended it.
        cut: the budget that ended it, if one did.
    """

    node: Node
    length: int
    matched: str | int | None
    cut: BudgetExceeded | None


class Scope:
    """A strategy at work: what it has used, what it may use, and the candidates it has offered so far.

    Attributes:
        nodes: the nodes made in it, those of inner scopes included.
        offers: what it would choose from if it were stopped now.
        on_progress: called whenever the scope's critical path may have grown (races listen).
    """

    def __init__(
        self, run: Run, parent: Scope | None, budget: Budget | None = None, offers: list[Candidate] | None = None
    ) -> None:
        self.parent = parent
        self.ledger = Ledger(budget or Budget())
        self.nodes: list[Node] = []
        self.offers: list[Candidate] = [] if offers is None else offers
        self.began = run.clock.now()
        self.base = self.reached = run.chains.depth(frontier.get())
        self.base_sequential = run.chains.sequential(frontier.get())
        self.on_progress: Callable[[], None] | None = None

    @property
    def chain(self) -> list[Scope]:
        """This scope and those around it, innermost first."""
        scopes = [self]
        while (parent := scopes[-1].parent) is not None:
            scopes.append(parent)
        return scopes

    @property
    def critical_path_tokens(self) -> int:
        """Longest dependent chain of sampled tokens so far, counted from where the scope began."""
        return self.reached - self.base


@dataclass
class Run:
    """The state of one run. Programs see it only through their threads.

    Attributes:
        engine: the engine of its threads; `engines` are those of aliases.
        seed: with fork path and position it determines everything random.
        extract: finds the answer in a text.
        listener: gets every `Event`.
        item, repeat: of the evaluation; see `Request`.
        prompt: what the run was asked; None if it is not known.
        clock: what all its times are read from: its engine's.
    """

    engine: Engine
    seed: int = 0
    engines: Mapping[str, Engine] = field(default_factory=dict)
    extract: Extractor = extract_answer
    listener: Callable[[Event], None] | None = None
    graph: ThreadGraph = field(default_factory=ThreadGraph)
    item: str = ""
    repeat: int = 0
    prompt: Prompt | None = None

    def __post_init__(self) -> None:
        self.clock = self.engine.clock(self.graph)
        self.began = self.clock.now()
        self._group: asyncio.TaskGroup | None = None  # owns what `start` begins, while the run is open
        self._started: list[asyncio.Task[Any]] = []
        self._forks: dict[Path, int] = {}
        self._drawn: set[tuple[Path, int]] = set()
        self.chains = Chains(self.graph)

    async def __aenter__(self) -> Run:
        self._group = await asyncio.TaskGroup().__aenter__()
        self._outside = frontier.set(frozenset()), current_scope.set(None)  # a run inside another one is its own
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """End what nobody awaited, then free what the engines keep for this run, even when cancelled."""
        assert self._group is not None  # entered
        for task in self._started:
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            raise first_error(errors) from None
        finally:
            frontier.reset(self._outside[0])
            current_scope.reset(self._outside[1])
            for engine in (self.engine, *self.engines.values()):
                await uninterrupted(engine.release(self.graph))

    async def end_background(self) -> None:
        """Cancel what `start` began and nobody awaited; what it had decoded is in the graph when this returns."""
        for task in self._started:
            task.cancel()
        if self._started:
            await asyncio.wait(self._started)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begin `work` in the background of the run; it is cancelled when the run closes."""
        if self._group is None:
            work.close()
            raise UsageError("start() works inside a running strategy")
        self._started.append(task := self._group.create_task(work))
        return task

    def engine_for(self, alias: str) -> Engine:
        """The engine of an alias; the run's own for the empty one."""
        if alias and alias not in self.engines:
            raise UsageError(one_of("engine alias", alias, self.engines) + "; name it in connect(..., engines={...})")
        return self.engines[alias] if alias else self.engine

    def waiting_for(self, engine: Engine) -> AbstractContextManager[None]:
        """While the body waits for `engine`: the run's clock stands still if that engine does not live by it."""
        return nullcontext() if engine.clock(self.graph) is self.clock else self.clock.held()

    async def encode_prompt(self, prompt: Prompt, alias: str, template: Mapping[str, Any]) -> Span:
        """A prompt as a span of the engine of `alias`.

        Raises:
            PromptError: the engine cannot take it.
            CapabilityError: the engine has recorded samples of the run's prompt, and this is another.
        """
        engine = self.engine_for(alias)
        if engine.recorded:
            if self.prompt is not None and prompt != self.prompt:
                raise CapabilityError(
                    f"{engine.name} has samples of the run's own prompt, not of one that a strategy writes; local:PATH "
                    "can answer it"
                )
            template = {**template, "item": self.item}
        with self.waiting_for(engine):
            return await engine.encode_prompt(prompt, **template)

    def fork_path(self, path: Path) -> Path:
        """The next unused fork path under `path`: no two threads of a run share randomness by accident."""
        index = self._forks.get(path, 0)
        self._forks[path] = index + 1
        return (*path, index)

    def add(self, context: Sequence[Edge], spans: Sequence[Span], path: Path, alias: str) -> Node:
        """Add a node that comes after its context and after the frontier."""
        behind = self.graph.view(context)
        awaited = [n for n in frontier.get() if n not in behind]
        node = self.graph.add(context, waits=awaited, path=path, spans=spans, engine=alias)
        self.chains.add(node, sum(behind.values()))
        for owner in scope().chain:
            owner.nodes.append(node)
        return node

    def add_concurrent(self, spans: Sequence[Span], path: Path, alias: str, reads: int) -> Node:
        """Add a concurrent node that comes after the frontier; it will read `reads` tokens at first."""
        node = self.graph.add_concurrent(waits=frontier.get(), path=path, spans=spans)
        node.engine = alias
        self.chains.add(node, reads)
        for owner in scope().chain:
            owner.nodes.append(node)
        self.draw(node)
        return node

    def add_siblings(self, context: Sequence[Edge], paths: Sequence[Path], alias: str) -> list[Node]:
        """Add empty nodes to be sampled into, which differ in nothing but their path."""
        if len(context) > 1:
            self._refuse_reuse(self.engine_for(alias))
        behind = self.graph.view(context)
        awaited = [n for n in frontier.get() if n not in behind]
        nodes = self.graph.add_siblings(context, waits=awaited, paths=paths, engine=alias)
        self.chains.add_siblings(nodes, sum(behind.values()))
        for owner in scope().chain:
            owner.nodes += nodes
        for node in nodes:
            self.draw(node)
        return nodes

    def settle(self, context: Sequence[Edge], spans: Sequence[Span], path: Path, alias: str) -> Node:
        """Add a node with nothing to sample: text that several threads share, or that is only scored."""
        node = self.add(context, spans, path, alias)
        node.finish_reason = "forced"
        return node

    def meet(self, path: Path, alias: str) -> Node:
        """Have what comes next come after one point, an empty node: all that the program has waited for has ended."""
        node = self.settle((), (), path, alias)
        frontier.set(frozenset((node.id,)))
        return node

    async def generate(
        self,
        context: Sequence[Edge],
        spans: Sequence[Span],
        path: Path,
        alias: str,
        sampling: Sampling,
        watch: Watch | None = None,
        member: tuple[Node, Gang] | None = None,
    ) -> Generated:
        """Add a node and sample into it. Cancelled, it stops the engine and keeps what was decoded by then.

        `watch` sees each delta and can end it; see `Thread.generate`. `member` is a concurrent node, which has been
        added, and its gang.

        Raises:
            BudgetExceeded: nothing is left to sample with.
            UsageError, EngineError: from the engine.
        """
        engine = self.engine_for(alias)
        if sampling.max_tokens is not None and sampling.max_tokens < 1:
            raise UsageError(f"max_tokens is at least 1, not {sampling.max_tokens}")
        self.check_settings(engine, sampling)
        if len(context) > 1:
            self._refuse_reuse(engine)
        reservation = await self.reserve(context, sampling.max_tokens, wait=member is None)
        used = 0
        try:
            if member is None:
                node, gang = self.add(context, spans, path, alias), None
                self.draw(node)
            else:
                node, gang = member
            limited = replace(sampling, max_tokens=reservation.granted)
            if self.full(engine, node):
                return Generated(node, len(node), None, None)
            try:
                with self.waiting_for(engine):
                    request = self.request(node, limited, 1 if watch else self.chunk, gang)
                    self.begin(node)
                    last = await self.follow(node, engine.generate(request), watch)
            finally:
                used = node.count("sampled")
        finally:
            reservation.end(used)
        frontier.set(frozenset((node.id,)))
        cut = reservation.cut if node.finish_reason == "length" and used == reservation.granted else None
        return Generated(node, len(node) - last.eos, last.matched, cut)

    async def reserve(
        self, context: Iterable[Edge], wanted: int | None, *, wait: bool = True, members: int = 1
    ) -> Reservation:
        """Tokens for generations that come after the frontier and `context`; see `Reservation.make`."""
        depth = self.chains.depth(frontier.get().union(edge.parent for edge in context))
        levels = [(owner.ledger, depth - owner.base) for owner in scope().chain]
        return await Reservation.make(levels, wanted, wait=wait, members=members)

    @staticmethod
    def check_settings(engine: Engine, sampling: Sampling) -> None:
        """Refuse settings that the engine would not follow.

        Raises:
            CapabilityError: it lacks what they need.
        """
        if missing := sorted(sampling.needs - engine.capabilities):
            able = "local:PATH and sglang://HOST:PORT can"
            if Capability.STREAMS in missing:
                able = "local:PATH of a ParScale model can (or local:PATH?streams=DIR)"
            raise CapabilityError(
                f"{engine.name} cannot do {', '.join(missing)}, which these sampling settings need; {able}"
            )

    @staticmethod
    def _refuse_reuse(engine: Engine) -> None:
        if Capability.REUSE_JOIN not in engine.capabilities:
            instead = "recorded samples cannot be continued; use" if engine.recorded else "use how='recompute' or"
            raise CapabilityError(f"{engine.name} cannot join by reuse; {instead} a local: engine")

    def full(self, engine: Engine, node: Node) -> bool:
        """Whether a thread has grown to the end of the context. It ends there, as if it had been sampled that far.

        A prompt that is too long by itself is the caller's mistake, and for the engine to refuse.
        """
        limit = engine.context_length
        if limit is None or node.end < limit or not any(n.count("sampled") for n in self.graph.nodes):
            return False
        node.finish_reason = "length"
        return True

    def draw(self, node: Node) -> None:
        """Claim the randomness at (path, position). Going on twice from one place is a fork in all but name."""
        if (tuple(node.path), node.end) in self._drawn:
            node.path = list(self.fork_path(tuple(node.path)))
        self._drawn.add((tuple(node.path), node.end))

    def request(self, node: Node, sampling: Sampling, chunk: int = 0, gang: Gang | None = None) -> Request:
        """The request to fill `node`, which has been added."""
        path, depth = tuple(node.path), self.chains.depth([node.id])
        return Request(self.graph, node, sampling, self.seed, path, chunk, depth, self.item, self.repeat, gang)

    @property
    def chunk(self) -> int:
        """Of requests: 1 if somebody looks at tokens as they come."""
        return int(bool(self.listener or any(owner.on_progress for owner in scope().chain)))

    def begin(self, node: Node) -> None:
        """An engine has been asked to fill `node`."""
        node.started = self.clock.now() - self.began
        self.chains.call(node)
        self._emit("start", node, node.text)

    async def follow(self, node: Node, stream: Stream, watch: Watch | None = None) -> Delta:
        """Write what comes into `node` until it ends; the last delta. Cancelled, it cancels the stream first."""
        sampled, within = Span("sampled"), scope()
        node.spans.append(sampled)
        try:
            return await self._read(stream, node, sampled, within, watch)
        except asyncio.CancelledError:
            stream.cancel()
            await uninterrupted(self._read(stream, node, sampled, within))
            raise
        except BaseException:
            node.finish_reason = "error"
            raise
        finally:
            node.ended = self.clock.now() - self.began
            self._emit("end", node)

    async def _read(
        self, stream: Stream, node: Node, sampled: Span, within: Scope, watch: Watch | None = None
    ) -> Delta:
        last = Delta()
        async for last in stream:
            sampled.tokens += last.tokens
            sampled.count += last.count
            sampled.text += last.text
            sampled.logprobs += last.logprobs
            sampled.tempered += last.tempered
            node.cached_tokens += last.cached_tokens
            node.views = last.views or node.views
            node.notes.update(last.notes)
            node.finish_reason = last.finish_reason
            self.chains.grow(node, last.count)
            depth = self.chains.depth([node.id])
            for owner in within.chain:
                owner.reached = max(owner.reached, depth)
                if owner.on_progress:
                    owner.on_progress()
            if last.text:
                self._emit("token", node, last.text)
            if watch is not None and watch(last) and not last.finish_reason:
                watch = None
                stream.cancel()
        return last

    def _emit(self, kind: Literal["start", "token", "end"], node: Node, text: str = "") -> None:
        if self.listener is not None:
            after = tuple(self.graph.predecessors(node.id)) if kind == "start" else ()
            path, beside = tuple(node.path), bool(node.views)
            self.listener(Event(kind, node.id, path, text, after, node.finish_reason, beside=beside))
