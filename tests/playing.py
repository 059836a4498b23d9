"""Runs of strategies on a scripted engine, for exact tests of control flow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orchestra
from orchestra import Outcome
from orchestra.runtime.engine import Engine
from orchestra.testing.scripted import Script, ScriptedEngine


def play(
    spec: Any,
    script: Script | Engine,
    prompt: Any = "go",
    engines: Mapping[str, Engine] | None = None,
    **settings: Any,
) -> Outcome:
    """Run `spec` on a script, or an engine; the outcome counts what the engines said, and nothing is left on them."""
    engine = script if isinstance(script, Engine) else ScriptedEngine(script)
    others = dict(engines or {})
    before = sum(one.load().sampled_tokens for one in (engine, *others.values()))

    async def main() -> Outcome:
        async with orchestra.connect(engine, others) as connection:
            return await connection.run(spec, prompt, **settings)

    outcome = asyncio.run(asyncio.wait_for(main(), 60))
    outcome.graph.check_integrity()
    said = sum(one.load().sampled_tokens for one in (engine, *others.values())) - before
    assert outcome.usage.sampled_tokens == outcome.graph.count("sampled") == said
    assert not any(one.load().requests for one in (engine, *others.values()))
    return outcome


def after(*replies: tuple[str, str]) -> Script:
    """A script that answers by the end of the context: the reply of the first ending that fits."""

    def script(context: str, path: tuple[int, ...]) -> str:
        return next(reply for ending, reply in replies if context.endswith(ending))

    return script
