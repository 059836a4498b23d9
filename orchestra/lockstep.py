"""Threads that grow together, one token each a step, and are seen, and can be stopped, between two steps.

Particles and beams need that: what they do next depends on what all of them have drawn. The program's function looks at
each step where it is made; only when it stops the group does the program itself come to run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from orchestra.concurrency import first_error, uninterrupted
from orchestra.errors import BudgetExceeded, UsageError
from orchestra.graph import Node
from orchestra.run import Run, frontier
from orchestra.runtime.engine import Delta, Engine, Look, Step, Stream
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
    parents = [edge for edges in contexts for edge in edges]
    reservation = await run.reserve(parents, sampling.max_tokens, wait=False, members=len(threads))
    nodes: list[Node] = []
    try:
        for thread, context in zip(threads, contexts, strict=True):
            nodes.append(run.add(context, (), thread.path, alias))
            run.draw(nodes[-1])
        lasts = await _fill(run, engine, nodes, replace(sampling, max_tokens=reservation.granted), look)
    finally:
        reservation.end(sum(node.count("sampled") for node in nodes))
    frontier.set(frozenset(node.id for node in nodes))
    ends = zip(threads, nodes, lasts, strict=True)
    grown = [thread._grown(node, len(node) - last.eos, last.matched) for thread, node, last in ends]
    cut = any(node.finish_reason == "length" and node.count("sampled") == reservation.granted for node in nodes)
    if reservation.cut is not None and cut:
        raise GroupCut(reservation.cut, grown)
    return grown


async def _fill(run: Run, engine: Engine, nodes: Sequence[Node], sampling: Sampling, look: Look) -> list[Delta]:
    """Sample into nodes, which have been added, to their ends; the last delta of each."""
    lasts = [Delta() for _ in nodes]
    growing = [index for index, node in enumerate(nodes) if not run.full(engine, node)]
    if not growing:
        return lasts
    errors: list[BaseException] = []
    begun: set[int] = set()

    def shown(step: Step) -> bool:
        """Called by the engine: an error of the program's must not become one of the engine's."""
        try:
            return look(step._replace(members=[growing[member] for member in step.members]))
        except BaseException as error:
            errors.append(error)
            return True

    async def follow(index: int, stream: Stream) -> None:
        begun.add(index)
        lasts[index] = await run.follow(nodes[index], stream)

    requests = [run.request(nodes[index], sampling, run.chunk) for index in growing]
    with run.waiting_for(engine):
        try:
            streams = dict(zip(growing, engine.generate_in_step(requests, shown), strict=True))
        except BaseException:
            for node in nodes:
                node.finish_reason = "error"
            raise
        for index in growing:
            run.begin(nodes[index])
        try:
            async with asyncio.TaskGroup() as readers:
                for index, stream in streams.items():
                    readers.create_task(follow(index, stream))
        except BaseException as error:
            for index in growing:
                if index not in begun:  # cancelled before it could read
                    streams[index].cancel()
                    await uninterrupted(follow(index, streams[index]))
            raise first_error(error) if isinstance(error, BaseExceptionGroup) else error from None
    if errors:
        raise errors[0]
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
