"""Threads that grow together, one token each a step, and are seen, and can be stopped, between two steps.

Particles and beams need that: what they do next depends on what all of them have drawn. The program's function looks at
each step where it is made; only when it stops the group does the program itself come to run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestra.budget import Reservation
from orchestra.concurrency import first_error, uninterrupted
from orchestra.errors import BudgetExceeded, UsageError
from orchestra.graph import Node
from orchestra.run import Run, frontier, scope
from orchestra.runtime.engine import Delta, Look, Step, Stream
from orchestra.runtime.sampling import Sampling

if TYPE_CHECKING:
    from orchestra.thread import Thread


class GroupCut(BudgetExceeded):
    """A budget ended threads that grow together; `threads` is what there is of them."""

    def __init__(self, cut: BudgetExceeded, threads: Sequence[Thread]) -> None:
        Exception.__init__(self, str(cut))
        self.limit, self.ledger, self.threads = cut.limit, cut.ledger, threads


async def generate(threads: Sequence[Thread], sampling: Sampling, look: Look) -> list[Thread]:
    """Generate on all of `threads` in lock-step. See `Threads.generate_in_step`."""
    run, alias = threads[0]._run, threads[0]._alias
    engine = run.engine_for(alias)
    if any(thread._run is not run or thread._alias != alias for thread in threads):
        raise UsageError("threads that grow together belong to one run and one engine")
    run.check_settings(engine, sampling)
    threads = [thread._rooted for thread in threads]
    contexts = [await thread._stem.edges() for thread in threads]
    within = scope()
    depth = run.chains.depth(frontier.get().union(edge.parent for edges in contexts for edge in edges))
    levels = [(owner.ledger, depth - owner.base) for owner in within.chain]
    reservation = await Reservation.make(levels, sampling.max_tokens, wait=False, members=len(threads))
    nodes: list[Node] = []
    try:
        for thread, context in zip(threads, contexts, strict=True):
            nodes.append(run.add(context, (), thread.path, alias))
            run.draw(nodes[-1])
        group = _Group(run, nodes, replace(sampling, max_tokens=reservation.granted), look)
        lasts = await group.generate(alias)
    finally:
        reservation.end(sum(node.count("sampled") for node in nodes))
    frontier.set(frozenset(node.id for node in nodes))
    ends = zip(threads, nodes, lasts, strict=True)
    grown = [thread._grown(node, len(node) - last.eos, last.matched) for thread, node, last in ends]
    cut = any(node.finish_reason == "length" and node.count("sampled") == reservation.granted for node in nodes)
    if reservation.cut is not None and cut:
        raise GroupCut(reservation.cut, grown)
    return grown


class _Group:
    """The generations of one call."""

    def __init__(self, run: Run, nodes: Sequence[Node], sampling: Sampling, look: Look) -> None:
        self._run, self._nodes, self._sampling, self._look = run, nodes, sampling, look
        self._error: BaseException | None = None

    async def generate(self, alias: str) -> list[Delta]:
        """Run them to their ends; the last delta of each."""
        run, engine = self._run, self._run.engine_for(alias)
        lasts = [Delta() for _ in self._nodes]
        growing = [index for index, node in enumerate(self._nodes) if not run.full(engine, node)]
        if not growing:
            return lasts

        def look(step: Step) -> bool:
            """Called by the engine: an error of the program's must not become one of the engine's."""
            try:
                return self._look(step._replace(members=[growing[member] for member in step.members]))
            except BaseException as error:
                self._error = error
                return True

        requests = [run.request(self._nodes[index], self._sampling, run.chunk) for index in growing]
        read: set[int] = set()

        async def follow(index: int, stream: Stream) -> None:
            read.add(index)
            lasts[index] = await run.follow(self._nodes[index], stream)

        with run.waiting_for(engine):
            streams = dict(zip(growing, engine.generate_in_step(requests, look), strict=True))
            for index in growing:
                run.begin(self._nodes[index])
            try:
                async with asyncio.TaskGroup() as readers:
                    for index, stream in streams.items():
                        readers.create_task(follow(index, stream))
            except BaseException as error:
                for index in growing:
                    if index not in read:  # cancelled before it had begun
                        streams[index].cancel()
                        await uninterrupted(follow(index, streams[index]))
                raise first_error(error) if isinstance(error, BaseExceptionGroup) else error from None
        if self._error is not None:
            raise self._error
        return lasts


def resampled(threads: Sequence[Thread], ancestors: Sequence[int]) -> None:
    """Note in the graph that who goes on was chosen, and tell the engine whose keys and values may go."""
    kept = set(ancestors)
    for thread in threads:
        thread._touch()
    run, alias = threads[0]._run, threads[0]._alias
    run.meet(threads[0].path, alias).notes["ancestors"] = list(ancestors)
    dead = [thread for index, thread in enumerate(threads) if index not in kept]
    living = {node for index in kept for node in run.graph.view(threads[index]._stem.known)}
    gone = {node for thread in dead for node in run.graph.view(thread._stem.known)} - living
    run.engine_for(alias).forget(run.graph, gone)
