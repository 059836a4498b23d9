"""A custom strategy that joins two branches: the second half of the thread sees both of them.

python examples/two_views.py local:PATH_OR_ID "Is a hot dog a sandwich?"
"""

from __future__ import annotations

import asyncio
import sys

import orchestra
from orchestra import Thread, strategy


@strategy
async def two_views(thread: Thread, sides: int = 2) -> Thread:
    """Think `sides` times side by side, then weigh the views in one thread."""
    views = await thread.fork(sides).generate(max_tokens=256, temperature=1.0)
    return await thread.join(views, "\nWeigh these:\n", how="recompute").generate(max_tokens=256)


async def main(url: str, question: str) -> None:
    async with orchestra.connect(url) as engine:
        async for event in engine.stream(two_views(), question):
            print(event.text, end="", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:3]))
