"""Two real servers behind SGLang's own router are one engine; one of them may die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
from conftest import started

import orchestra
from orchestra.runtime.connect import EMBEDDED, open_engine
from orchestra.runtime.sglang_server import SGLangServer, free_port
from orchestra.testing import check_agreement, check_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PROMPT = "numbers: 3 7 8 12 target: 55"


@contextmanager
def routed(log, *ports: int) -> Iterator[int]:
    """A router in front of servers, ready when it lists them all."""
    if find_spec("sglang_router") is None:
        pytest.skip("sglang-router is not installed here: make .venv/.sglang")
    port = free_port()
    command = [sys.executable, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--policy", "round_robin", "--prometheus-port", str(free_port())]
    command += ["--worker-urls", *(f"http://127.0.0.1:{p}" for p in ports)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        asyncio.run(ready(port, len(ports)))
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def ready(port: int, workers: int) -> None:
    import aiohttp

    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while True:
            await asyncio.sleep(0.2)
            try:
                async with session.get(f"http://127.0.0.1:{port}/workers") as answer:
                    listed = (await answer.json())["workers"]
            except (aiohttp.ClientError, KeyError, ValueError):
                continue
            if sum(worker["is_healthy"] for worker in listed) == workers:
                return


def test_two_servers_are_one_engine(sglang_server, tmp_path) -> None:
    async def main(port: int, second: SGLangServer) -> None:
        for url in (f"sglang://127.0.0.1:{port}", f"openai://127.0.0.1:{port}/v1"):
            engine = open_engine(url)
            await check_engine(engine)
            await engine.close()
        here, there = open_engine("demo"), open_engine(f"sglang://127.0.0.1:{port}")
        for spec in ("self_consistency(samples=4)", "spawn_join(children=3)"):
            assert await check_agreement(here, there, spec, PROMPT, temperature=0, max_tokens=200)
        assert there.facts()["workers"] == 2
        await here.close()
        await there.close()

        async with orchestra.connect(f"sglang://127.0.0.1:{port}?timeout=5") as connection:
            calm = await connection.run("sample", PROMPT, temperature=0, max_tokens=300)
            task = asyncio.ensure_future(
                connection.run("self_consistency(samples=8)", PROMPT, temperature=0, max_tokens=300)
            )
            await asyncio.sleep(0.5)
            await asyncio.to_thread(second.stop)  # with half of the samples on it
            outcome = await task
            assert [candidate.text for candidate in outcome.candidates] == [calm.text] * 8
            assert outcome.usage.sampled_tokens == 8 * calm.usage.sampled_tokens

    with (
        started(SGLangServer, EMBEDDED, tmp_path / "second.log") as second,
        routed(tmp_path / "router.log", sglang_server.port, second.port) as port,
    ):
        asyncio.run(main(port, second))
