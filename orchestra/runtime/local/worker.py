"""The thread that owns the scheduler: takes work in, runs steps, hands results to event loops."""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import torch

from orchestra.errors import EngineError, OrchestraError
from orchestra.graph import ThreadGraph
from orchestra.runtime.engine import Delta, Load
from orchestra.runtime.local.gang import LocalGang
from orchestra.runtime.local.jobs import Job, Score
from orchestra.runtime.local.rotary import Rotary
from orchestra.runtime.local.scheduler import Scheduler

Delivery = list[tuple[Job, Delta | EngineError]]

_OPEN: weakref.WeakSet[Worker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # A thread inside torch while the interpreter goes down ends the process with an abort.
    for worker in list(_OPEN):
        worker.close()


class Worker:
    """Runs a scheduler on a thread of its own. All methods are thread-safe and return at once.

    Between two steps the thread takes in what came: so a cancel, a release or a new generation waits for one step at
    most. Results of a step go to each event loop in one call.

    Args:
        scheduler: to be touched by the thread alone from now on.
        debug: check the cache's invariants after every step and whenever nothing is left to do.
    """

    def __init__(self, scheduler: Scheduler, debug: bool = False) -> None:
        self._scheduler, self._debug = scheduler, debug
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0
        self._over: str | None = None  # why nothing more can be put in
        self._leaving: set[int] = set()  # runs whose release is on its way: what is known of them will be gone
        self._load = Load()
        self._thread = threading.Thread(target=self._main, name="orchestra-engine", daemon=True)
        self._thread.start()
        _OPEN.add(self)

    def submit(self, job: Job) -> None:
        """Start a generation.

        Raises:
            EngineError: the engine is closed, or its thread has died.
        """
        with self._lock:
            self._put(lambda: self._take(job))
            self._queued += 1

    def submit_together(self, jobs: list[Job]) -> None:
        """Start the generations of a lock-step group, between the same two steps; raises as `submit` does."""

        def take() -> None:
            for job in jobs:
                self._take(job)

        with self._lock:
            self._put(take)
            self._queued += len(jobs)

    def forget(self, graph: ThreadGraph, nodes: list[int]) -> None:
        """Drop what some nodes of a run have, unless somebody reads it."""

        def act() -> None:
            if (run := self._scheduler.runs.get(id(graph))) is not None:
                self._scheduler.cache.forget(run, nodes)

        self.post(act)

    def cancel(self, job: Job) -> None:
        """Stop a generation between two steps; its stream ends with what it has."""
        with self._lock, suppress(EngineError):
            self._put(lambda: self._scheduler.cancel(job))

    def score(self, score: Score) -> None:
        """Start a scoring; raises as `submit` does."""
        with self._lock:
            self._put(lambda: self._scheduler.submit_score(score))

    def gang(self, graph: ThreadGraph, members: int, context: int, rotary: Rotary) -> LocalGang:
        """A gang of a run; see `LocalGang`."""
        gang = LocalGang(self, graph, members, context, self._scheduler.cache, rotary)
        self.post(lambda: self._scheduler.gangs.setdefault(gang))
        return gang

    def leave(self, gang: LocalGang) -> None:
        """One member of a gang is fewer; the last one closes it."""

        def act() -> None:
            gang.members -= 1
            if not gang.members:
                self._scheduler.close_gangs([gang])

        self.post(act)

    def release(self, graph: ThreadGraph) -> Future[None]:
        """Forget a run; the future is done when nothing of it is left."""
        done: Future[None] = Future()

        def act() -> None:
            try:
                self._scheduler.release(graph)
            finally:
                self._leaving.discard(id(graph))
                self._publish()
                self._deliver()
                done.set_result(None)

        with self._lock:
            self._leaving.add(id(graph))
            try:
                self._put(act)
            except EngineError:  # closed or dead: nothing is left of any run
                done.set_result(None)
        return done

    def check_integrity(self) -> Future[None]:
        """Check the cache's invariants between two steps; the future raises what is wrong."""
        done: Future[None] = Future()

        def act() -> None:
            try:
                self._scheduler.check_integrity()
            except AssertionError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            self._put(act)
        return done

    def between_runs(self, act: Callable[[], None]) -> Future[None]:
        """Change the model between two steps, when no run is there; the future raises what goes wrong."""
        done: Future[None] = Future()

        def change() -> None:
            try:
                if runs := len(self._scheduler.runs):
                    raise EngineError(f"weights are changed between runs; {runs} in progress")
                self._scheduler.cache.forget_kept()  # keys and values of the old weights
                with torch.inference_mode(False), torch.no_grad():
                    act()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._lock:
            self._put(change)
        return done

    def post(self, act: Callable[[], None]) -> None:
        """Do something between two steps, in the order of arrival; nothing if the engine is closed."""
        with self._lock, suppress(EngineError):
            self._put(act)

    def _put(self, act: Callable[[], None]) -> None:
        # Under the lock, so that nothing can be put in after the thread's last look.
        if self._over is not None:
            raise EngineError(self._over)
        self._inbox.put(act)

    def known(self, graph: ThreadGraph, node: int) -> int:
        """How many tokens of a node are known here; a lower bound, as the thread goes on."""
        run = self._scheduler.runs.get(id(graph)) if id(graph) not in self._leaving else None
        place = run.nodes.get(node) if run is not None else None
        return 0 if place is None else place.size

    def load(self) -> Load:
        """As of the end of the last step; generations count from the moment they are submitted."""
        load = self._load
        return Load(
            load.requests + self._queued,
            load.cached_tokens,
            load.cached_bytes,
            load.sampled_tokens,
            load.computed_tokens,
            load.kept_tokens,
            load.kept_bytes,
            load.peak_bytes,
        )

    def close(self) -> None:
        """End what runs (as cancelled) and the thread. Blocks for one step at most."""
        with self._lock:
            if self._over is None:
                self._over = "the engine is closed"
                self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- on the thread -------------------------------------------------------------------------------------------

    def _take(self, job: Job) -> None:
        with self._lock:
            self._queued -= 1
        self._scheduler.submit(job)

    def _main(self) -> None:
        with torch.inference_mode():
            busy = False
            while self._over is None:
                try:
                    busy = self._turn(busy)
                except Exception as error:
                    busy = False
                    try:
                        self._scheduler.fail(_failure(error))
                    except Exception as second:  # the scheduler's own state is broken: give up, but tell everybody
                        self._die(second)
                self._publish()
                self._deliver()
            self._end()

    def _turn(self, busy: bool) -> bool:
        self._drain(block=not busy)
        scheduler = self._scheduler
        if scheduler.step():
            if self._debug:
                scheduler.check_integrity()
            return True
        if not scheduler.paused:
            scheduler.arena.trim()
        if self._debug:
            scheduler.check_integrity()
        if (scheduler.waiting or scheduler.scores) and not scheduler.stalled:
            raise EngineError("no generation can go on: each waits for another")
        return False

    def _end(self) -> None:
        """The last turn: everything that came before the door closed is ended."""
        scheduler = self._scheduler
        with suppress(Exception):
            self._drain(block=False)
        with suppress(Exception):
            for run in list(scheduler.runs.values()):
                scheduler.release(run.graph)
        while not self._inbox.empty():
            with suppress(Exception):
                self._drain(block=False)
        self._publish()
        self._deliver()

    def _die(self, error: Exception) -> None:
        with self._lock:
            self._over = f"the engine has failed and cannot go on: {error!r}"
        scheduler = self._scheduler
        for job in scheduler.jobs():
            scheduler.outbox.append((job, EngineError(self._over)))
        for score in scheduler.scores:
            with suppress(Exception):
                score.future.set_exception(EngineError(self._over))
        scheduler.runs.clear()
        scheduler.waiting.clear()
        scheduler.scores.clear()
        scheduler.admission.admitted.clear()
        scheduler.arena.slabs.clear()

    def _drain(self, block: bool) -> None:
        with suppress(queue.Empty):
            while True:
                self._inbox.get(block=block)()
                block = False

    def _publish(self) -> None:
        scheduler = self._scheduler
        cache = scheduler.cache
        self._load = Load(
            len(scheduler.jobs()) + len(scheduler.scores),
            cache.tokens - cache.kept_tokens,
            scheduler.memory.bytes - cache.kept_bytes,
            scheduler.sampled,
            scheduler.computed,
            cache.kept_tokens,
            cache.kept_bytes,
            scheduler.memory.peak,
        )

    def _deliver(self) -> None:
        outbox, self._scheduler.outbox = self._scheduler.outbox, []
        loops: dict[asyncio.AbstractEventLoop, Delivery] = {}
        for job, item in outbox:
            loops.setdefault(job.loop, []).append((job, item))
        for loop, delivery in loops.items():
            try:
                loop.call_soon_threadsafe(_push, delivery)
            except RuntimeError:  # the loop is closed: nobody will ever read what its generations make
                for job in self._scheduler.jobs():
                    if job.loop is loop:
                        self._scheduler.cancel(job)
                self._scheduler.outbox = [(job, item) for job, item in self._scheduler.outbox if job.loop is not loop]
                self._publish()


def _failure(error: Exception) -> EngineError:
    if isinstance(error, EngineError):
        return error
    failure = EngineError(str(error) if isinstance(error, OrchestraError) else f"a step failed: {error!r}")
    failure.__cause__ = error
    return failure


def _push(delivery: Delivery) -> None:
    """On the reader's event loop."""
    for job, item in delivery:
        if isinstance(item, Delta):
            job.stream.push(item)
        else:
            job.stream.fail(item)
