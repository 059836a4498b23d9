"""Random programs: what to fork, cut, join and generate; played on any engine they make random thread graphs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime.engine import Delta, Engine, Request, Sampling

LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")


@dataclass(frozen=True, slots=True)
class Step:
    """One node of a program.

    Attributes:
        parents: context: index of an earlier step and the share of its tokens that is kept (1: all).
        appended: earlier steps whose tokens are forced here (a recompute join).
        text: text forced after them.
        sampling: how to generate; None for a node with forced tokens only.
    """

    parents: tuple[tuple[int, float], ...] = ()
    appended: tuple[int, ...] = ()
    text: str = ""
    sampling: Sampling | None = None


@dataclass(slots=True)
class Played:
    """A program that was run.

    Attributes:
        graph: what it made.
        nodes: the node of each step (ids depend on the order in which steps came to run).
        deltas: what the engine gave for each step, merged; None where nothing was sampled.
        seed: of the run.
    """

    graph: ThreadGraph
    nodes: list[Node]
    deltas: list[Delta | None] = field(default_factory=list)
    seed: int = 0


def random_program(
    seed: int,
    *,
    nodes: int = 8,
    tokens: int = 12,
    words: Sequence[str] = LETTERS,
    temperature: float | None = None,
    settings: Sequence[Mapping[str, Any]] = (),
) -> list[Step]:
    """A program of nested forks, cuts, reuse joins and recompute joins, on one or two roots.

    Args:
        seed: everything follows from it.
        nodes: number of steps.
        tokens: most tokens to sample, and most words to force, per step.
        words: what prompts are made of, joined by blanks.
        temperature: None mixes greedy and warm generations.
        settings: further fields of `Sampling`; each generation has one of these.
    """
    draw = random.Random(seed)
    program: list[Step] = []

    def text(least: int) -> str:
        return " " + " ".join(draw.choice(words) for _ in range(draw.randint(least, tokens)))

    def sampling() -> Sampling:
        warm = draw.choice([0.0, 0.7, 1.0]) if temperature is None else temperature
        plain = Sampling(temperature=warm, max_tokens=draw.randint(1, tokens), ignore_eos=True)
        return replace(plain, **draw.choice(settings)) if settings else plain

    for i in range(nodes):
        kind = "root" if i == 0 else draw.choice(["root", "fork", "fork", "fork", "cut", "cut", "reuse", "recompute"])
        if kind == "root":
            program.append(Step(text=text(1), sampling=draw.choice([None, sampling()])))
            continue
        parent = draw.randrange(i)
        forced = draw.choice(["", text(1)])
        step = Step(((parent, 1.0),), (), forced, sampling())
        if kind == "cut":
            step = Step(((parent, draw.random()),), (), forced, sampling())
        elif kind == "reuse":
            others = [(other, draw.choice([1.0, draw.random()])) for other in draw.sample(range(i), min(i, 3))]
            step = Step(tuple(others), (), text(1), sampling())
        elif kind == "recompute":
            step = Step(((parent, 1.0),), tuple(draw.sample(range(i), min(i, 2))), forced, sampling())
        program.append(step)
    return program


async def play(
    engine: Engine,
    program: Sequence[Step],
    *,
    seed: int = 0,
    together: bool = True,
    chunk: int = 4,
    backwards: bool = False,
) -> Played:
    """Run a program; the caller releases `graph`.

    Args:
        engine: where.
        program: what.
        seed: of the run.
        together: start each step as soon as its parents have ended; else one after the other.
        chunk: of the requests.
        backwards: of the steps that can start at the same time, the last first.
    """
    graph = ThreadGraph()
    played = Played(graph, [], [None] * len(program), seed)
    nodes: dict[int, Node] = {}
    ended = [asyncio.Event() for _ in program]

    async def run(i: int) -> None:
        step = program[i]
        for need in {*(parent for parent, _ in step.parents), *step.appended}:
            await ended[need].wait()
        edges = [
            Edge(nodes[parent].id, min(len(nodes[parent]), max(1, round(share * len(nodes[parent])))))
            for parent, share in step.parents
        ]
        spans = []
        if not step.parents:
            spans.append(await engine.encode_prompt(step.text))
        else:
            copied = [token for other in step.appended for token in nodes[other].tokens]
            spans += [Span("forced", copied, len(copied))] if copied else []
            spans += [await engine.encode(step.text)] if step.text else []
        node = graph.add(edges, waits=[nodes[other].id for other in step.appended], path=[i], spans=spans)
        nodes[i] = node
        if step.sampling is not None:
            played.deltas[i] = await generate(engine, graph, node, step.sampling, seed=seed, chunk=chunk)
        ended[i].set()

    order = range(len(program))[::-1] if backwards else range(len(program))
    if together:
        async with asyncio.TaskGroup() as group:
            for i in order:
                group.create_task(run(i))
    else:
        for i in range(len(program)):
            await run(i)
    played.nodes = [nodes[i] for i in range(len(program))]
    return played


async def generate(
    engine: Engine, graph: ThreadGraph, node: Node, sampling: Sampling, *, seed: int = 0, chunk: int = 4
) -> Delta:
    """One generation, written into its node; returns all of it as one delta."""
    whole = Delta()
    async for delta in engine.generate(Request(graph, node, sampling, seed, tuple(node.path), chunk)):
        whole.merge(delta)
    if whole.count:
        node.spans.append(Span("sampled", whole.tokens, whole.count, whole.text, whole.logprobs))
    node.finish_reason = whole.finish_reason
    return whole


async def random_graph(engine: Engine, seed: int, **options: Any) -> ThreadGraph:
    """A random graph made by real generations; `options` as for `random_program`. The caller releases it."""
    return (await play(engine, random_program(seed, **options), seed=seed)).graph
