"""Two engines on the same weights say the same."""

from __future__ import annotations

from typing import Any

from orchestra.api import connect
from orchestra.graph import Edge, Node, ThreadGraph
from orchestra.outcome import Outcome
from orchestra.runtime.engine import Engine, Prompt, Request, Sampling
from orchestra.strategies.base import Spec
from orchestra.testing.laws import CLOSE_CALL


async def check_agreement(
    one: Engine, other: Engine, strategy: Spec, prompt: Prompt, *, close_call: float = CLOSE_CALL, **settings: Any
) -> bool:
    """Run a greedy strategy on two engines and compare every thread, token by token.

    Threads may part where the two likeliest tokens are closer than `close_call`; what comes after that is another
    story, and not compared. Joins must be recomputed, and races go by tokens, or the engines may do different things.

    Args:
        one: an engine that reports the likeliest tokens and can leave a node in the middle.
        other: the engine to compare with it.
        strategy: in any of its three forms.
        prompt: something it can work on.
        close_call: see above.
        settings: as for `Connection.run`.

    Returns:
        Whether the texts are equal to their ends.

    Raises:
        AssertionError: the first difference that is no close call.
    """
    outcomes: list[Outcome] = []
    for engine in (one, other):
        async with connect(engine) as connection:
            outcomes.append(await connection.run(strategy, prompt, **settings))
    ours, theirs = (_sampled(outcome.graph) for outcome in outcomes)
    for node in ours.values():
        twin = theirs.get((tuple(node.path), node.start))
        if twin is None:
            raise AssertionError(f"{strategy}: a thread {node.path} at {node.start} is on {one.name} only")
        said, heard = _tokens(node), _tokens(twin)
        if "cancelled" in (node.finish_reason, twin.finish_reason):  # where a loser stops is a matter of time
            length = min(len(said), len(heard))
            said, heard = said[:length], heard[:length]
        if said == heard:
            continue
        parted = next(
            (i for i, (a, b) in enumerate(zip(said, heard, strict=False)) if a != b), min(len(said), len(heard))
        )
        gap = await _gap(one, outcomes[0].graph, node, parted)
        assert gap < close_call, (
            f"{strategy}: thread {node.path} at {node.start + parted}: {one.name} says {said[parted : parted + 3]}, "
            f"{other.name} {heard[parted : parted + 3]}; the two likeliest are {gap:.2g} apart"
        )
        return False
    assert outcomes[0].text == outcomes[1].text, (
        f"{strategy}: equal tokens, but {outcomes[0].text!r} != {outcomes[1].text!r}"
    )
    assert outcomes[0].answer == outcomes[1].answer
    return True


def _sampled(graph: ThreadGraph) -> dict[tuple[tuple[int, ...], int], Node]:
    return {(tuple(node.path), node.start): node for node in graph.nodes if node.count("sampled")}


def _tokens(node: Node) -> list[int]:
    return [token for span in node.spans if span.origin == "sampled" for token in span.tokens]


async def _gap(engine: Engine, graph: ThreadGraph, node: Node, at: int) -> float:
    """How far apart the two likeliest tokens are at a sampled position."""
    before = len(node) - node.count("sampled") + at
    context = [Edge(node.id, before)] if before else node.context
    again = graph.add(context)
    sampling = Sampling(max_tokens=1, logprobs=True, top_logprobs=2, ignore_eos=True)
    try:
        async for delta in engine.generate(Request(graph, again, sampling)):
            for top in delta.top:
                first, second = sorted(top.values(), reverse=True)[:2]
                return first - second
    finally:
        await engine.release(graph)
    raise AssertionError(f"{engine.name} reports no likeliest tokens")
