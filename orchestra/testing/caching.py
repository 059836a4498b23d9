"""The laws of an engine's cache: what is there is found, what is not the same is not found, a limit is a limit.

They are for engines in process, whose `Load` counts every computed token (`LocalEngine`). Each raises `AssertionError`.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.runtime.engine import Engine, Sampling
from orchestra.testing.graphs import LETTERS, Step, generate, play, random_program
from orchestra.testing.laws import LOGIT_TOLERANCE, check_parity, compare


@runtime_checkable
class HasIntegrity(Protocol):
    """An engine that can say whether its own books are right."""

    async def check_integrity(self) -> None:
        """Raises `AssertionError` if they are not."""


async def check_integrity(engine: Engine) -> None:
    """The invariants of the engine's cache hold now; of an engine that keeps no books, nothing is asked."""
    if isinstance(engine, HasIntegrity):
        await engine.check_integrity()


async def check_prefix_reuse(
    engine: Engine, seed: int, *, released: bool = False, model: Any = None, words: Sequence[str] = LETTERS
) -> int:
    """A run that begins as another one did computes only what is new, and says the same as if it had computed all.

    Random beginnings of random paths, cut anywhere, with and without something new behind them, become the prompts of
    new runs: in one node, or in a chain of them.

    Args:
        engine: with memory for everything; float32.
        seed: of all that is random here.
        released: the first run has ended before the others come; only of engines that keep something of ended runs.
        model: the plain Hugging Face model; by default `engine.plain_model()`.
        words: what prompts are made of.

    Returns:
        How many tokens were found.
    """
    draw = random.Random(seed)
    first = (await play(engine, random_program(seed, words=words), seed=seed)).graph
    paths = _computed(first)
    planted = []
    for tokens in draw.sample(paths, min(3, len(paths))):
        planted.append(tokens[: draw.randint(1, len(tokens))] + draw.choice([[], first.nodes[0].tokens[-3:]]))
    if released:
        await engine.release(first)
    found, surely = 0, len(paths)
    for tokens in planted:
        found += await _plant(engine, tokens, paths, draw, model, surely=surely)
    if not released:
        await engine.release(first)
    return found


async def check_joined_cache_is_not_found(
    engine: Engine, seed: int, *, model: Any = None, words: Sequence[str] = LETTERS
) -> int:
    """No prompt finds what was computed after a reuse join, whatever tokens stand there: their context was another.

    Args:
        engine: float32.
        seed: of a random program, to which a join of two branches is added.
        model: the plain Hugging Face model; by default `engine.plain_model()`.
        words: what prompts are made of.

    Returns:
        How many prompts were tried.
    """
    draw = random.Random(seed)
    program = random_program(seed, words=words)
    last = len(program)
    branch = Step(((0, 1.0),), (), " " + " ".join(draw.choices(words, k=2)), Sampling(max_tokens=6, ignore_eos=True))
    program += [branch, branch]
    program.append(Step(((last, 1.0), (last + 1, 1.0)), (), " " + " ".join(draw.choices(words, k=6)), branch.sampling))
    program.append(Step(((last + 2, 1.0),), (), "", branch.sampling))
    graph = (await play(engine, program, seed=seed)).graph
    paths = _computed(graph)
    tried = 0
    for node in graph.nodes:
        if _plain(graph, node):
            continue
        for tokens in _strings(graph, node):
            await _plant(engine, tokens, paths, draw, model, surely=None)
            tried += 1
    await engine.release(graph)
    return tried


async def check_memory_limit(
    engine: Engine,
    other: Engine,
    limit: int,
    seed: int,
    *,
    runs: int = 3,
    words: Sequence[str] = LETTERS,
    **options: Any,
) -> int:
    """With little memory everything takes longer and says the same; no byte too many is ever held, and none is left.

    Args:
        engine: with a limit, in which each generation fits alone.
        other: the same model without a limit.
        limit: bytes of keys and values, padding included.
        seed: of the programs.
        runs: how many are played at the same time.
        words: what prompts are made of.
        options: as for `random_program`.

    Returns:
        The number of tokens compared.
    """
    baseline = engine.load()
    programs = [random_program(seed + i, words=words, **options) for i in range(runs)]
    played = await asyncio.gather(*(play(engine, program, seed=seed + i) for i, program in enumerate(programs)))
    compared = 0
    for i, (program, mine) in enumerate(zip(programs, played, strict=True)):
        theirs = await play(other, program, seed=seed + i)
        compared += compare(program, mine, theirs)
        await other.release(theirs.graph)
    nodes = [(mine.graph, node) for mine in played for node in mine.graph.nodes]
    scored = await asyncio.gather(*(engine.score(*node) for node in nodes))
    for (graph, node), scores in zip(nodes, scored, strict=True):
        right = await other.score(graph, node)
        off = max((abs(a - b) for a, b in zip(scores, right, strict=True)), default=0.0)
        scale = max((abs(value) for value in right), default=1.0)
        assert off <= LOGIT_TOLERANCE * max(1.0, scale), f"node {node.id}: scores differ by {off:.2g} under the limit"
    await check_integrity(engine)
    for mine in played:
        await other.release(mine.graph)
        await engine.release(mine.graph)
    load = engine.load()
    assert load.peak_bytes <= limit, f"{load.peak_bytes} bytes of keys and values; the limit is {limit}"
    left = [load.requests, load.cached_tokens, load.cached_bytes]
    before = [baseline.requests, baseline.cached_tokens, baseline.cached_bytes]
    assert left == before, f"left behind: requests, tokens, bytes {left}, were {before}"
    await check_integrity(engine)
    return compared


async def _plant(
    engine: Engine, tokens: list[int], paths: list[list[int]], draw: random.Random, model: Any, *, surely: int | None
) -> int:
    """Run a prompt that may be found, and say how much of it was; it is one of the `paths` after it, if it is kept."""
    graph = ThreadGraph()
    parent: Node | None = None
    cuts = sorted({0, len(tokens), *(draw.randrange(1, len(tokens) + 1) for _ in range(draw.choice([0, 0, 2])))})
    for a, b in pairwise(cuts):
        edges = [Edge(parent.id, len(parent))] if parent is not None else []
        parent = graph.add(edges, spans=[Span("forced" if edges else "prompt", tokens[a:b], b - a)])
    assert parent is not None
    node = graph.add([Edge(parent.id, len(parent))]) if draw.random() < 0.5 else parent
    before = engine.load().computed_tokens
    delta = await generate(engine, graph, node, Sampling(max_tokens=4, ignore_eos=True, logprobs=True), seed=1)
    computed = engine.load().computed_tokens - before - (delta.count - 1)
    longest = max((_common(tokens, path) for path in paths), default=0)
    found = delta.cached_tokens
    assert computed == len(tokens) - found, f"{found} of {len(tokens)} tokens were found, but {computed} computed"
    assert found <= longest, f"{found} tokens were found, but no causal path shares more than {longest}"
    if surely is not None:  # so many of the paths were not made by a prompt that has ended
        there = max((_common(tokens, path) for path in paths[:surely]), default=0)
        assert found >= there, f"{found} tokens were found, of {there} that were there"
    await check_parity(engine, graph, model)
    await check_integrity(engine)
    await engine.release(graph)
    paths.append(tokens + delta.tokens[:-1])
    return found


def _plain(graph: ThreadGraph, node: Node) -> bool:
    while len(node.context) == 1 and not node.views:
        node = graph.nodes[node.context[0].parent]
    return not node.context and not node.views


def _computed(graph: ThreadGraph) -> list[list[int]]:
    """The token strings that have keys and values: what a generation attended to, and fed after what it sampled."""
    strings = []
    for node in graph.nodes:
        readers = [other for other in graph.nodes if other.count("sampled")]
        length = max((graph.view(other.context).get(node.id, 0) for other in readers), default=0)
        length = max(length, len(node) - 1 if node.count("sampled") else 0)
        if length and _plain(graph, node):
            strings.append(graph.path_tokens(node.id, length))
    return strings


def _strings(graph: ThreadGraph, node: Node) -> list[list[int]]:
    """Token strings that someone might take for the path of a joined node."""
    view = graph.view(node.context)
    strings = [[token for i, length in view.items() for token in graph.nodes[i].tokens[:length]] + node.tokens]
    for parent, length in node.context:
        if _plain(graph, graph.nodes[parent]):
            strings.append(graph.path_tokens(parent, length) + node.tokens)
    return strings


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)
