"""The laws of strategies, for anyone to run on a strategy of their own. Failures are `AssertionError`s."""

from __future__ import annotations

import asyncio
from typing import Any

from orchestra.api import Connection, connect
from orchestra.budget import Budget
from orchestra.graph import ThreadGraph
from orchestra.outcome import Outcome
from orchestra.runtime.engine import Capability, Engine, Load, Prompt
from orchestra.strategies.base import Spec


async def check_strategy(engine: Engine, strategy: Spec, prompt: Prompt, *, seed: int = 0, **settings: Any) -> Outcome:
    """Run a strategy in all the ways in which it must not go wrong.

    Conservation: what it reports equals what the engine sampled and what its graph holds. Schedule invariance (engines
    with seeds): alone, again, and beside others it says the same; two tokens that are closer than rounding can break
    this, rarely. Budgets are never passed. No leak: finished, stopped or cancelled, it leaves nothing on the engine.

    Args:
        engine: an idle engine.
        strategy: in any of its three forms.
        prompt: something it can work on.
        seed: of the run that is compared.
        settings: as for `Connection.run`.

    Returns:
        The outcome of the plain run.
    """
    idle = engine.load()
    async with connect(engine) as connection:
        alone = await _conserving(connection, strategy, prompt, seed, settings)
        _at_rest(engine, idle)
        if Capability.SEED in engine.capabilities:
            others = [seed + 1, seed, seed + 2, seed]
            together = await asyncio.gather(
                *(connection.run(strategy, prompt, seed=other, **settings) for other in others)
            )
            _at_rest(engine, idle)
            for outcome, other in zip(together, others, strict=True):
                if other == seed:
                    assert _said(outcome.graph) == _said(alone.graph), f"{strategy} depends on the schedule"
                    assert outcome.text == alone.text, f"{strategy} chooses by the schedule"
        await _check_budget(connection, strategy, prompt, seed, settings, alone)
        _at_rest(engine, idle)
        for part in (0.0, 0.3, 0.8):
            await _check_cancel(connection, strategy, prompt, seed, settings, int(part * alone.usage.sampled_tokens))
            _at_rest(engine, idle)
    return alone


async def _conserving(
    connection: Connection, strategy: Spec, prompt: Prompt, seed: int, settings: dict[str, Any]
) -> Outcome:
    before = connection.engine.load().sampled_tokens
    outcome = await connection.run(strategy, prompt, seed=seed, **settings)
    computed = connection.engine.load().sampled_tokens - before
    graph, usage = outcome.graph, outcome.usage
    graph.check_integrity()
    assert ThreadGraph.from_json(graph.to_json()) == graph, "the graph does not survive JSON"
    assert usage.sampled_tokens == graph.count("sampled") == computed, (
        f"{usage.sampled_tokens} sampled tokens reported, {graph.count('sampled')} in the graph, {computed} computed"
    )
    longest = graph.critical_path_length()
    assert 0 < usage.critical_path_tokens <= longest, f"critical path {usage.critical_path_tokens} of {longest}"
    assert all(node.finish_reason for node in graph.nodes), "a node never ended"
    return outcome


async def _check_budget(
    connection: Connection, strategy: Spec, prompt: Prompt, seed: int, settings: dict[str, Any], alone: Outcome
) -> None:
    for limit, whole in (
        ("sampled_tokens", alone.usage.sampled_tokens),
        ("critical_path_tokens", alone.usage.critical_path_tokens),
    ):
        most = max(1, whole // 2)
        outcome = await connection.run(
            strategy, prompt, seed=seed, **(settings | {"budget": Budget.model_validate({limit: most})})
        )
        used = getattr(outcome.usage, limit)
        assert used <= most, f"{strategy} used {used} of {limit}={most}"


async def _check_cancel(
    connection: Connection, strategy: Spec, prompt: Prompt, seed: int, settings: dict[str, Any], after: int
) -> None:
    reached = connection.engine.load().sampled_tokens + after
    task = asyncio.create_task(connection.run(strategy, prompt, seed=seed, **settings))
    while not task.done() and connection.engine.load().sampled_tokens < reached:  # noqa: ASYNC110 (no event for it)
        await asyncio.sleep(0.001)  # a busy loop would starve an engine that computes in this process
    task.cancel()
    await asyncio.wait([task])


def _said(graph: ThreadGraph) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """What was sampled at (fork path, position) by threads that came to their end."""
    return {
        (tuple(node.path), node.start): node.tokens
        for node in graph.nodes
        if node.count("sampled") and node.finish_reason != "cancelled"
    }


def _at_rest(engine: Engine, idle: Load) -> None:
    load = engine.load()
    assert load.requests == idle.requests, f"{load.requests} requests are left on the engine"
    assert load.cached_bytes == idle.cached_bytes, f"{load.cached_bytes} bytes of keys and values are left"
    assert load.cached_tokens == idle.cached_tokens, f"{load.cached_tokens} tokens are left in the cache"
