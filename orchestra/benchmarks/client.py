"""What a client costs: `self_consistency` beside a bare aiohttp loop, on a server that only waits.

The server has a process of its own and answers every chat completion with the same text after a fixed time, so all
beyond that is the client, or the machine. Both clients run in this process and take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from orchestra.benchmarks.report import Column

if TYPE_CHECKING:
    from aiohttp import web

ANSWER = "42"
PROMPT = "How many ways are there to seat six people at a round table? " * 8
TEXT = f"{'Let us count them one after the other. ' * 12}\\boxed{{{ANSWER}}}"
SAMPLING = {"temperature": 0.6, "max_tokens": 256}

COLUMNS = (
    Column("client", "client"),
    Column("wall", "wall, ms", ",.0f"),
    Column("cpu", "CPU, s per 1000", ",.3f"),
    Column("wall_ratio", "wall ratio", ".2f"),
    Column("cpu_ratio", "CPU ratio", ".2f"),
)
NOTES = (
    "Medians over the repetitions, after one that is not counted; ratios are medians of the repetitions' ratios to the "
    "bare loop. CPU is of the client's process only."
)

Client = Callable[[], Awaitable[int]]


def rows(samples: int, milliseconds: float, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure both clients: `samples` completions at once, each answered after so many milliseconds.

    Raises:
        AssertionError: an answer was lost or changed.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found = asyncio.run(_measure(samples, milliseconds, repeats))
    bare = found["bare aiohttp"]
    for name, times in found.items():
        wall, cpu = (statistics.median(one[i] for one in times) for i in (0, 1))
        row = {"client": name, "wall": 1000 * wall, "cpu": 1000 * cpu / samples, "repetitions": times}
        if times is not bare:
            pairs = list(zip(times, bare, strict=True))
            row["wall_ratio"], row["cpu_ratio"] = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
        yield row


async def _measure(samples: int, milliseconds: float, repeats: int) -> dict[str, list[tuple[float, float]]]:
    import aiohttp

    import orchestra

    async with contextlib.AsyncExitStack() as stack:
        port = await stack.enter_async_context(_server(milliseconds))
        engine = await stack.enter_async_context(
            orchestra.connect(f"openai://127.0.0.1:{port}/v1?model=fixed&api=chat&n=off")
        )
        connector = aiohttp.TCPConnector(limit=0)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        body = {"model": "fixed", "messages": [{"role": "user", "content": PROMPT}], **SAMPLING}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"

        async def ask() -> bool:
            async with session.post(url, json=body) as response:
                text: str = json.loads(await response.read())["choices"][0]["message"]["content"]
                return text == TEXT

        async def bare() -> int:
            return sum(await asyncio.gather(*(ask() for _ in range(samples))))

        async def ours() -> int:
            outcome = await engine.run(f"self_consistency(samples={samples})", PROMPT, **SAMPLING)
            return sum(candidate.answer == ANSWER for candidate in outcome.candidates)

        clients: dict[str, Client] = {"bare aiohttp": bare, f"Orchestra, self_consistency(samples={samples})": ours}
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in clients}
        for turn in range(repeats + 1):
            for name, client in clients.items():
                wall, cpu = time.perf_counter(), time.process_time()
                good = await client()
                took = time.perf_counter() - wall, time.process_time() - cpu
                assert good == samples, f"{name}: {samples - good} of {samples} answers are wrong"
                if turn:
                    found[name].append(took)
        return found


@contextlib.asynccontextmanager
async def _server(milliseconds: float) -> AsyncIterator[int]:
    """The server in a process of its own; gives its port."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "orchestra.benchmarks.client",
        str(milliseconds),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ,
    )
    try:
        assert process.stdout is not None
        yield int(await process.stdout.readline())
    finally:
        process.kill()
        await process.wait()


async def _serve(milliseconds: float) -> None:
    from aiohttp import web

    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 120, "completion_tokens": 130, "total_tokens": 250}
    answer = json.dumps({"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()

    async def complete(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(milliseconds / 1000)
        return web.Response(body=answer, content_type="application/json")

    async def models(_: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fixed", "object": "model"}]})

    app = web.Application(client_max_size=2**24)
    app.add_routes([web.post("/v1/chat/completions", complete), web.get("/v1/models", models)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1])))
