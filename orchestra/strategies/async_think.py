"""Asynchronous thinking: an organiser forks sub-queries to workers, thinks on while they work, and joins them later."""

from __future__ import annotations

from pydantic import Field

from orchestra.group import Future
from orchestra.outcome import Outcome
from orchestra.protocols.async_think import ASYNC_THINK, MOST_WORKERS
from orchestra.protocols.base import Branch
from orchestra.runtime.engine import Capability
from orchestra.strategies.base import StrategyField
from orchestra.strategies.one_thread import OneThread, turn
from orchestra.strategies.prompts import alike, followed_by
from orchestra.strategies.sample import Sample
from orchestra.thread import Thread

INSTRUCTIONS = """You organise up to {workers} workers who think at the same time as you do. To give worker i \
(i = 1, 2, ...) a sub-question of its own, write <FORK-i>the sub-question</FORK-i>; it sees nothing else that you \
write, so say all it has to know. Go on thinking while it works. To get its result, write <JOIN-i>; the result then \
follows in <RETURN-i>...</RETURN-i>. Join a worker only when you need its result, and write no result yourself. A \
worker that was joined can be forked again. At the end give your answer."""
"""What `instruct` adds to the prompt."""


class AsyncThink(OneThread):
    """An organiser forks workers without waiting, and joins them when it needs them (AsyncThink).

    It writes `<FORK-i>sub-query</FORK-i>` and goes on at once while a worker begins; where it writes `<JOIN-i>` it gets
    the worker's result, waiting for it if it must. The only strategy here whose forks do not block.
    Critical path: the longest chain of the organiser's stretches and the workers that it had to wait for.

    Needs a model that was taught the language (`orchestra.protocols.ASYNC_THINK`), or `instruct` and a capable one.

    Attributes:
        workers: size of the pool; a fork that finds it full begins when the worker before it in its place has ended.
        shared: workers are shown the run's own prompt before their sub-query.
        instruct: explain the language in the prompt, for models that were never taught it.
        opening: forced after the prompt, before the organiser speaks; None: what the model's folder says, if anything
            (docs/data.md).
        drafts: what a worker does with its sub-query.
        stops: how often the organiser is stopped at a tag; then it is written to its end.
    """

    needs = frozenset({Capability.CONTINUE})
    paper = "Chi et al. 2025, arXiv 2510.26658"

    workers: int = Field(4, ge=1, le=MOST_WORKERS)
    shared: bool = True
    instruct: bool = False
    opening: str | None = None
    drafts: StrategyField = Field(default_factory=Sample)
    stops: int = Field(64, ge=1, le=1024)

    async def __call__(self, thread: Thread) -> Thread:
        """The organiser's text; workers that nobody joined are cancelled at its end."""
        pool = _Pool(self, thread)
        try:
            return await self._organise(thread, pool)
        finally:
            await pool.close()

    async def _organise(self, thread: Thread, pool: _Pool) -> Thread:
        reader = ASYNC_THINK.reader()
        thread = thread.using(skip_special_tokens=False)
        if self.instruct:
            (thread,) = thread.spawn([followed_by(thread.prompt, INSTRUCTIONS.format(workers=self.workers))])
        opening = await thread.opening(ASYNC_THINK.name) if self.opening is None else self.opening
        thread = thread.append(opening)
        reader.feed(opening)
        for left in reversed(range(self.stops + 1)):
            thread = await turn(thread, stop=ASYNC_THINK.stops(MOST_WORKERS) if left else ())
            fork = reader.feed(thread.generated)
            if thread.matched is None:
                break
            if fork is not None:
                pool.start(thread, fork.branches[0])
            if reader.wait is not None:
                said = ASYNC_THINK.returned(reader.wait, await pool.result(reader.wait))
                reader.feed(said)
                thread = thread.append(said)
        return thread


class _Pool:
    """The workers of one organiser."""

    def __init__(self, strategy: AsyncThink, thread: Thread) -> None:
        self._strategy, self._prompt = strategy, thread.prompt
        self._places: list[Future[Outcome]] = []  # in the order of the forks
        self._working: dict[str, Future[Outcome]] = {}

    def start(self, organiser: Thread, branch: Branch) -> None:
        """Begin a sub-query in the background, in the next place of the pool."""
        ask = followed_by(self._prompt, branch.title) if self._strategy.shared else alike(self._prompt, branch.title)
        (worker,) = organiser.spawn([ask])
        before = self._places[-self._strategy.workers :][:1] if len(self._places) >= self._strategy.workers else []

        async def work(worker: Thread) -> Outcome:
            for one in before:
                await one
            return await worker.run(self._strategy.drafts)

        self._working[branch.label] = worker.start(work=work)
        self._places.append(self._working[branch.label])

    async def result(self, label: str) -> str | None:
        """What the worker of a label hands back; None if there is no such worker, or nothing came of it."""
        worker = self._working.pop(label, None)
        return None if worker is None else ASYNC_THINK.result((await worker).text)

    async def close(self) -> None:
        """Cancel whoever still works; what they have said by then is in the graph."""
        for worker in self._places:
            await worker.stop()
