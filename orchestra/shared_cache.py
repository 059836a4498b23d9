"""Workers who write side by side and read each other's tokens as they appear (Hogwild! Inference, arXiv:2504.06261)."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self

from orchestra.errors import UsageError
from orchestra.graph import Edge, Node, Span
from orchestra.run import Generated, Run
from orchestra.runtime.engine import Gang
from orchestra.stem import encode
from orchestra.thread import BudgetCut, Thread

Layout = Literal["combined", "interleaved", "contiguous"]


@dataclass(frozen=True)
class Headers:
    """What stands before the parts of a worker's view; empty for nothing.

    Attributes:
        past: before the steps that have ended.
        others: before what the others are writing.
        own: before what the worker is writing itself.
    """

    past: str = ""
    others: str = ""
    own: str = ""


@dataclass(frozen=True)
class Step:
    """What a worker wrote in one go.

    Attributes:
        worker: who.
        node: its tokens.
        text: forced and sampled.
        generated: the sampled text alone.
        count: number of sampled tokens.
        matched: the stop string or id that ended it.
        finish_reason: `stop`, `length` or `cancelled`.
        eos: the model ended its text.
    """

    worker: int
    node: Node = field(repr=False)
    text: str
    generated: str
    count: int
    matched: str | int | None
    finish_reason: str | None
    eos: bool


class SharedCache:
    """One cache that several workers read and write at the same time, in lock-step.

    Where a worker stands in its own view, after everything else, depends on the layout:

    - `combined`: the past of all (steps in the order in which they ended), what the others are writing, what it writes;
    - `interleaved`: the past of all, what it writes; what others are writing is seen when their step has ended;
    - `contiguous`: all that each of the others has written, in order of the workers, then all that it has.

    Use as an asynchronous context manager; whoever is left at its end leaves. Everybody waits for a worker between two
    of its steps, so what is written does not depend on timing; `leave` lets the others go on without one.

    Args:
        thread: where all of them begin; see `Thread.shared`.
        workers: how many.
        layout: see above.
        headers: texts between the parts of the view.

    Attributes:
        steps: all steps that have ended, in that order.
    """

    def __init__(self, thread: Thread, workers: int, layout: Layout, headers: Headers) -> None:
        self.thread, self.layout, self.headers = thread, layout, headers
        self.workers = workers
        self.steps: list[Step] = []
        self._run: Run = thread._run
        self._paths = [self._run.fork_path(thread.path) for _ in range(workers + 1)]
        self._here = set(range(workers))
        self._spare = False  # the last worker has left: its place in the gang is free
        self._before: list[Edge] = []
        self._between: dict[str, list[Edge]] = {"others": [], "own": []}
        self._history: list[Edge] = []
        self._open: list[list[Edge]] = [[] for _ in range(workers + 1)]  # what each has written and is not history
        self._writing: dict[int, int] = {}
        self._gang: Gang | None = None

    async def __aenter__(self) -> Self:
        run, thread = self._run, self.thread._rooted
        engine = run.engine_for(thread._alias)
        self._gang = engine.gang(run.graph, self.workers)
        edges = await thread._stem.edges()
        self._before = [Edge(i, n) for i, n in run.graph.view(edges).items()]
        for name in ("past", "others", "own"):
            if text := getattr(self.headers, name):
                spans = await encode(run, edges, (text,), thread._alias)
                node = run.settle(edges, spans, thread.path, thread._alias)
                (self._before if name == "past" else self._between[name]).append(Edge(node.id, len(node)))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in tuple(self._here):
            self.leave(worker)
        if self._spare and self._gang is not None:
            self._gang.leave()

    @property
    def text(self) -> str:
        """What all have written, in the order in which their steps ended."""
        return "".join(step.text for step in self.steps)

    @property
    def ids(self) -> list[int]:
        """The token ids of `text`."""
        read = dict([*self._history, *(edge for edges in self._open for edge in edges)])
        return [token for step in self.steps for token in step.node.tokens[: read[step.node.id]]]

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        run, thread = self._run, self.thread._rooted
        return [token for span in await encode(run, [], (text,), thread._alias) for token in span.tokens]

    def leave(self, worker: int) -> None:
        """A worker writes no more, and nobody waits for it; what it has written stays."""
        if worker not in self._here or self._gang is None:
            return
        self._here.remove(worker)
        self._close(worker)
        self._arrange(self._gang)
        if self._here:
            self._gang.leave()
        else:  # somebody may write an end to it
            self._spare = True

    async def write(self, worker: int, text: str = "", **sampling: Any) -> Step:
        """A worker's next step: `text`, and what the model writes after it.

        When all have left one more step can be written, as that of a worker with the next number.

        Args:
            worker: whose; the same worker's steps come one after another.
            text: written by the program. If it is empty the step goes on where the worker's last one ended.
            sampling: as for `Thread.generate`.

        Raises:
            UsageError: an empty text for a first step: nothing predicts its first token.
            BudgetExceeded: a budget ended it; what there is of the step is among `steps`.
        """
        assert self._gang is not None, "enter it first"
        run, thread = self._run, self.thread._rooted
        if text:
            self._close(worker)
            spans = await encode(run, await thread._stem.edges(), (text,), thread._alias)
        else:
            spans = self._take_back(worker)
        path = run.fork_path(self._paths[worker])
        node = run.add_concurrent(spans, path, thread._alias, sum(step.count for step in self.steps))
        self._writing[worker] = node.id
        self._arrange(self._gang)
        try:
            settings = self.thread.sampling(**sampling)
            done = await run.generate((), (), tuple(node.path), thread._alias, settings, member=(node, self._gang))
        except BaseException:
            self._end(worker, Generated(node, len(node), None, None), text)
            raise
        step = self._end(worker, done, text)
        if done.cut is not None:
            raise BudgetCut(done.cut, thread)
        return step

    def _take_back(self, worker: int) -> list[Span]:
        """The last token of a worker, which nobody has read yet: what follows it is predicted by it."""
        last = self._run.graph.nodes[self._open[worker][-1].parent] if self._open[worker] else None
        if last is None or len(last) < 2 or not last.tokens:
            raise UsageError("a worker's first step begins with a text: nothing predicts its first token")
        self._open[worker][-1] = Edge(last.id, len(last) - 1)
        return [Span("forced", last.tokens[-1:], 1)]

    def _close(self, worker: int) -> None:
        """A worker's step has ended: it is history, in the layouts that have one."""
        if self.layout != "contiguous":
            self._history += self._open[worker]
            self._open[worker] = []

    def _end(self, worker: int, done: Generated, text: str) -> Step:
        node = done.node
        sampled = [span for span in node.spans if span.origin == "sampled"]
        said, count = "".join(span.text for span in sampled), sum(span.count for span in sampled)
        eos = done.length < len(node)
        step = Step(worker, node, text + said, said, count, done.matched, node.finish_reason, eos)
        del self._writing[worker]
        if node.ended is None:  # it never began: there is nothing to read
            node.finish_reason = "cancelled"
            return step
        self._open[worker].append(Edge(node.id, done.length))
        self.steps.append(step)
        return step

    def _arrange(self, gang: Gang) -> None:
        """Tell the gang what each worker who is writing reads before its own step."""
        views: dict[int, list[Edge]] = {}
        blocks = [
            [*edges, *([Edge(self._writing[worker], 0)] if worker in self._writing else [])]
            for worker, edges in enumerate(self._open)
        ]
        settled = [*self._before, *self._history]
        for worker, node in self._writing.items():
            others: list[Edge] = []
            if self.layout != "interleaved":
                others = self._between["others"].copy()
                others += [edge for w, block in enumerate(blocks) if w != worker for edge in block]
            views[node] = [*settled, *others, *self._between["own"], *self._open[worker]]
        gang.arrange(views, len(settled))
