"""The laws of the design as functions that anyone can run on an engine of their own. Each raises `AssertionError`.

Tolerances (docs/design.md): attention outputs in float32 1e-5; logits 1e-4 x max(1, largest |logit|). *Equal greedy
text* is token-identical up to the first position whose top two logits are closer than 1e-3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Delta, Engine, Prompt, Request, Sampling
from orchestra.testing.graphs import LETTERS, Played, Step, generate, play, random_program
from orchestra.training.flatten import flatten

if TYPE_CHECKING:
    from torch import Tensor

LOGIT_TOLERANCE = 1e-4
CLOSE_CALL = 1e-3


class HasModel(Protocol):
    """What the parity law needs beyond the engine protocol."""

    def plain_model(self) -> Any:
        """The Hugging Face model with its own attention."""


def row_logits(model: Any, graph: ThreadGraph) -> Tensor:
    """Logits `[tokens, vocabulary]` of one training-style forward of a plain model over `flatten(graph)`."""
    import torch

    from orchestra.training.collate import GraphCollator

    batch = GraphCollator(0, config=model.config, dtype=model.dtype, weights=False)([flatten(graph)])
    del batch["labels"]
    with torch.inference_mode():
        logits: Tensor = model(**batch, use_cache=False).logits[0]
    return logits.float()


async def check_parity(engine: Engine, graph: ThreadGraph, model: Any = None, *, scores: bool = True) -> float:
    """One training-style forward over `flatten(graph)` gives the log-probabilities that the engine reported.

    Args:
        engine: the engine that made the graph; float32.
        graph: with log-probabilities in its sampled spans.
        model: the plain Hugging Face model; by default `engine.plain_model()`.
        scores: also ask the engine to score every node, so that forced tokens are compared too.

    Returns:
        The largest difference, in nats.
    """
    if model is None:
        model = engine.plain_model()  # type: ignore[attr-defined]  # in-process engines have it
    row = flatten(graph)
    assert len(row), "nothing to compare: the graph has no tokens"
    logits = row_logits(model, graph)
    table = logits.log_softmax(-1)
    tolerance = LOGIT_TOLERANCE * max(1.0, float(logits.abs().max()))
    expected: dict[tuple[int, int], float] = {}
    for i, before in enumerate(row.predecessors):
        if before is not None:
            expected[row.nodes[i], row.indices[i]] = float(table[before, row.tokens[i]])
    worst, compared = 0.0, 0
    for node in graph.nodes:
        reported: list[tuple[int, float]] = []
        index = 0
        for span in node.spans:
            reported += enumerate(span.logprobs, index)
            index += span.count
        if scores:
            scored = await engine.score(graph, node)
            assert len(scored) == len(node), f"node {node.id}: {len(scored)} scores for {len(node)} tokens"
            reported += enumerate(scored)
        for k, value in reported:
            # What nothing predicts (the first token of a root or of a reuse join) is scored 0.
            right = expected.get((node.id, k), 0.0)
            off = abs(value - right)
            worst, compared = max(worst, off), compared + 1
            assert off <= tolerance, f"node {node.id} token {k}: {value:.6f}, but one forward gives {right:.6f}"
    assert compared, "nothing to compare: the engine reported no log-probabilities"
    return worst


async def check_greedy(engine: Engine, prompt: Prompt, tokens: int = 32, model: Any = None) -> int:
    """Greedy text equals transformers' `generate`, by the rule of the module.

    Returns:
        The number of identical tokens.
    """
    import torch

    if model is None:
        model = engine.plain_model()  # type: ignore[attr-defined]  # in-process engines have it
    graph = ThreadGraph()
    span = await engine.encode_prompt(prompt)
    node = graph.add(spans=[span])
    ours = (await generate(engine, graph, node, Sampling(max_tokens=tokens))).tokens
    await engine.release(graph)
    ids = torch.tensor([span.tokens])
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[
        0, len(span.tokens) :
    ].tolist()
    with torch.inference_mode():
        logits = model(torch.tensor([span.tokens + ours])).logits[0, len(span.tokens) - 1 : -1].float()
    best = logits.topk(2, -1).values
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if same < max(len(ours), len(theirs)):
        gap = float(best[min(same, len(ours) - 1), 0] - best[min(same, len(ours) - 1), 1])
        assert gap < CLOSE_CALL, (
            f"greedy text differs from generate at token {same}, where the top two are {gap:.4f} apart"
        )
    behind = best[:, 0] - logits.gather(1, torch.tensor(ours).unsqueeze(1)).squeeze(1)
    assert float(behind.max()) < CLOSE_CALL, f"token {int(behind.argmax())} is not the most likely one"
    return same


async def check_schedule_invariance(
    engines: Sequence[Engine], seed: int, *, words: Sequence[str] = LETTERS, **options: Any
) -> int:
    """The same program gives the same tokens alone, together, in another order, in other chunks, on other settings.

    Args:
        engines: one model, differently scheduled (batch sizes, prefill chunks, grouping, kernels).
        seed: of the program and of the run.
        words: what prompts are made of.
        options: as for `random_program`.

    Returns:
        The number of tokens compared.
    """
    program = random_program(seed, words=words, **options)
    modes: list[dict[str, Any]] = [{"together": False}, {"together": True}, {"backwards": True, "chunk": 1}]
    played: list[Played] = []
    for engine in engines:
        for mode in modes:
            played.append(await play(engine, program, seed=seed, **mode))
            await engine.release(played[-1].graph)
        # And with strangers in the batch.
        crowd = await asyncio.gather(*(play(engine, program, seed=seed + other) for other in range(3)))
        played.append(crowd[0])
        for other in crowd:
            await engine.release(other.graph)
    return sum(compare(program, played[0], other) for other in played[1:])


def compare(program: Sequence[Step], one: Played, other: Played) -> int:
    """Two plays of a program, token by token up to close calls; returns the number of tokens compared."""
    compared, forked = 0, set[int]()  # steps that went separate ways at a close call: what follows cannot be compared
    for i, step in enumerate(program):
        a, b = one.deltas[i], other.deltas[i]
        if forked & {*(parent for parent, _ in step.parents), *step.appended}:
            forked.add(i)
            continue
        if a is None or b is None:
            continue
        for k, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=False)):
            if x != y:
                gap = _gap(step.sampling or Sampling(), one.seed, i, one.nodes[i].end - a.count + k, a, b, k)
                assert gap < CLOSE_CALL, f"step {i} token {k} is {x} in one schedule and {y} in another"
                forked.add(i)
                break
            compared += 1
        else:
            assert len(a.tokens) == len(b.tokens), (
                f"step {i} has {len(a.tokens)} tokens in one schedule, {len(b.tokens)} in another"
            )
    return compared


def _gap(sampling: Sampling, seed: int, step: int, position: int, a: Delta, b: Delta, k: int) -> float:
    """How far apart the two candidates were in what the draw maximises."""
    scores = [a.logprobs[k], b.logprobs[k]]
    if sampling.temperature:
        import numpy as np

        from orchestra.runtime.local.sampler import gumbel, noise_key

        size = max(a.tokens[k], b.tokens[k]) + 1
        noise = gumbel(np.array([noise_key(seed, (step,))], np.uint64), np.array([position]), size)[0]
        scores = [s / sampling.temperature + float(noise[d.tokens[k]]) for s, d in zip(scores, (a, b), strict=True)]
    return abs(scores[0] - scores[1])


async def check_conservation(engine: Engine, seed: int, *, words: Sequence[str] = LETTERS, **options: Any) -> int:
    """Every sampled token is in exactly one delta, those of cancelled generations included.

    Returns:
        The number of tokens sampled.
    """
    before = engine.load().sampled_tokens
    program = random_program(seed, words=words, **options)
    played = await play(engine, program, seed=seed)
    counted = sum(delta.count for delta in played.deltas if delta is not None)
    assert counted == played.graph.count("sampled"), "the graph and the deltas count differently"
    counted += await _race(engine, played.graph, wait=True)
    await engine.release(played.graph)
    computed = engine.load().sampled_tokens - before
    assert counted == computed, f"the engine sampled {computed} tokens, the deltas hold {counted}"
    return counted


async def check_no_leak(engine: Engine, seed: int, *, words: Sequence[str] = LETTERS, **options: Any) -> None:
    """After a run has ended, was cancelled, or was released in the middle, nothing of it is on the engine."""
    baseline = engine.load()
    for wait in (True, False):
        played = await play(engine, random_program(seed, words=words, **options), seed=seed)
        await _race(engine, played.graph, wait=wait)
        await engine.release(played.graph)
        await engine.release(played.graph)
        load = engine.load()
        left = {
            name: getattr(load, name) - getattr(baseline, name)
            for name in ("requests", "cached_tokens", "cached_bytes")
        }
        assert not any(left.values()), f"left behind: {left}"


async def _race(engine: Engine, graph: ThreadGraph, *, wait: bool) -> int:
    """Fork the last node three times; the first token of the first cancels all. Returns the tokens in the deltas.

    The others are asked for large chunks, so that what they had decoded by then comes with their last delta only.
    """
    last = graph.nodes[-1]
    nodes = [graph.add([Edge(last.id, len(last))], path=[1000 + i]) for i in range(3)]
    warm = Sampling(1.0, max_tokens=400, ignore_eos=True)
    streams = [
        engine.generate(Request(graph, node, warm, i, tuple(node.path), 1 if i == 0 else 10_000))
        for i, node in enumerate(nodes)
    ]
    counted = (await anext(streams[0])).count
    for stream in streams:
        stream.cancel()
    if wait:
        for stream in streams:
            counted += sum([delta.count async for delta in stream])
    return counted
