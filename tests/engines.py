"""What the tests of the in-process engine share."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import orchestra
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Sampling
from orchestra.runtime.local.engine import LocalEngine

WARM = Sampling(1.0, max_tokens=8, ignore_eos=True)


@asynccontextmanager
async def opened(folder: str, **options):
    engine = LocalEngine(folder, **options)
    try:
        yield await engine.open()
    finally:
        await engine.close()


DEMO = "numbers: 3 7 8 12 target: 54"


def run(strategy, engine=None, prompt=DEMO, **settings):
    """The outcome of a strategy on an engine of one's own, or on the embedded model."""

    async def main():
        async with orchestra.connect(engine or open_engine("demo")) as connection:
            return await connection.run(strategy, prompt, **settings)

    return asyncio.run(asyncio.wait_for(main(), 60))


async def root(engine, graph, text="the answer is"):
    return graph.add(spans=[await engine.encode_prompt(text)])


async def quiet(engine):
    """The load once nothing runs any more and the slots are given back (shortly after the last delta)."""
    last = None
    while (load := engine.load()).requests or load != last:
        last = load
        await asyncio.sleep(0.05)
    return load


async def until(condition, seconds=60):
    """Wait until something is so."""
    for _ in range(seconds * 1000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError
