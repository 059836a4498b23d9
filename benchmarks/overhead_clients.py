"""The clients that `client_overhead.py` compares; each runs in a process of its own, as

    python benchmarks/overhead_clients.py NAME PORT

It imports, connects, does one repetition that nobody counts and says `{"ready": ..., "version": ...}`. Then it does one
repetition for each line on its standard input, answered by a line: wall seconds, CPU seconds of this process,
completions, errors, events.
A completion counts when its text ends in the answer that the server gives; all else is an error.

Only what a client needs is imported: some of them run in an environment of their own, without Orchestra.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from importlib import metadata
from typing import Any, NamedTuple

SAMPLES = 256
RUNS = 2000
MAX_TOKENS = 256
TEMPERATURE = 0.6
ANSWER = "42"
ENDING = f"\\boxed{{{ANSWER}}}"
PROMPT = ("How many ways are there to seat six people at a round table? " * 9)[:499]  # 500 tokens with the first one


class Tally(NamedTuple):
    """What one repetition brought: completions that are as they should be, and events that a caller saw before them."""

    good: int
    events: int = 0


Repetition = Callable[[], Awaitable[Tally]]


async def _good(answers: Iterable[Coroutine[Any, Any, str]]) -> Tally:
    """How many texts are complete, all asked for at once; a failure is counted, not raised, if others succeed."""
    texts = await asyncio.gather(*answers, return_exceptions=True)
    failures = [text for text in texts if isinstance(text, BaseException)]
    if len(failures) == len(texts):
        raise failures[0]
    return Tally(sum(isinstance(text, str) and text.endswith(ENDING) for text in texts))


@contextlib.asynccontextmanager
async def _session(port: int) -> AsyncIterator[Any]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector) as session:
        yield session


async def _prompt_ids(session: Any) -> list[int]:
    async with session.post("/v1/tokenize", json={"prompt": PROMPT}) as response:
        ids: list[int] = (await response.json())["tokens"]
        return ids


def _native(ids: list[int], rid: str, **more: Any) -> dict[str, Any]:
    params = {"temperature": TEMPERATURE, "max_new_tokens": MAX_TOKENS, "no_stop_trim": True}
    stream = more.pop("stream", False)
    return {"rid": rid, "input_ids": ids, "stream": stream, "sampling_params": params | more}


def _bare(count: int) -> Callable[[int], contextlib.AbstractAsyncContextManager[Repetition]]:
    @contextlib.asynccontextmanager
    async def client(port: int) -> AsyncIterator[Repetition]:
        async with _session(port) as session:
            ids = await _prompt_ids(session)

            async def ask(i: int) -> str:
                async with session.post("/generate", json=_native(ids, f"bare-{i}")) as response:
                    text: str = json.loads(await response.read())["text"]
                    return text

            yield lambda: _good(map(ask, range(count)))

    return client


@contextlib.asynccontextmanager
async def bare_n(port: int) -> AsyncIterator[Repetition]:
    async with _session(port) as session:
        ids = await _prompt_ids(session)

        async def once() -> Tally:
            async with session.post("/generate", json=_native(ids, "bare", n=SAMPLES)) as response:
                answers = json.loads(await response.read())
            return Tally(sum(answer["text"].endswith(ENDING) for answer in answers))

        yield once


@contextlib.asynccontextmanager
async def bare_stream(port: int) -> AsyncIterator[Repetition]:
    async with _session(port) as session:
        ids = await _prompt_ids(session)

        async def once() -> Tally:
            events = 0

            async def ask(i: int) -> str:
                nonlocal events
                text = ""
                body = _native(ids, f"bare-{i}", stream=True, stream_interval=1)
                async with session.post("/generate", json=body) as response:
                    async for line in response.content:
                        if line.startswith(b"data: {"):
                            text = json.loads(line[6:])["text"]
                            events += 1
                return text

            good, _ = await _good(map(ask, range(SAMPLES)))
            return Tally(good, events)

        yield once


_CHAT = {
    "model": "fake",
    "messages": [{"role": "user", "content": PROMPT}],
    "max_tokens": MAX_TOKENS,
    "temperature": TEMPERATURE,
}


@contextlib.asynccontextmanager
async def bare_chat(port: int) -> AsyncIterator[Repetition]:
    async with _session(port) as session:

        async def ask() -> str:
            async with session.post("/v1/chat/completions", json=_CHAT) as response:
                text: str = json.loads(await response.read())["choices"][0]["message"]["content"]
                return text

        yield lambda: _good(ask() for _ in range(SAMPLES))


@contextlib.asynccontextmanager
async def openai_client(port: int) -> AsyncIterator[Repetition]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:

        async def ask() -> str:
            answer = await client.chat.completions.create(**_CHAT)
            return answer.choices[0].message.content or ""

        yield lambda: _good(ask() for _ in range(SAMPLES))


@contextlib.asynccontextmanager
async def its_hub(port: int) -> AsyncIterator[Repetition]:
    from its_hub import LMOrchestrator, OpenAICompatibleLanguageModel, SelfConsistency

    def boxed(text: str) -> str:
        found = re.findall(r"\\boxed\{([^}]*)\}", text)
        return found[-1] if found else ""

    model = OpenAICompatibleLanguageModel(
        f"http://127.0.0.1:{port}/v1", "none", "fake", max_completion_tokens=MAX_TOKENS, temperature=TEMPERATURE
    )
    vote = SelfConsistency(boxed, orchestrator=LMOrchestrator(max_concurrency=-1))
    async with model:

        async def once() -> Tally:
            result = await vote.ainfer(model, PROMPT, SAMPLES, return_response_only=False)
            return Tally(result.response_counts[ANSWER])

        yield once


def _votes(outcome: Any) -> int:
    """How many candidates of a vote have the answer."""
    return sum(candidate.answer == ANSWER for candidate in outcome.candidates)


def _orchestra(
    url: str, strategy: str = f"self_consistency(samples={SAMPLES})", runs: int = 1, live: bool = False
) -> Callable[[int], contextlib.AbstractAsyncContextManager[Repetition]]:
    settings = {"temperature": TEMPERATURE, "max_tokens": MAX_TOKENS}

    @contextlib.asynccontextmanager
    async def client(port: int) -> AsyncIterator[Repetition]:
        import orchestra

        async with orchestra.connect(url.format(port=port)) as engine:

            async def one() -> str:
                return (await engine.run(strategy, PROMPT, **settings)).text

            async def many() -> Tally:
                return await _good(one() for _ in range(runs))

            async def vote() -> Tally:
                outcome = await engine.run(strategy, PROMPT, **settings)
                return Tally(_votes(outcome))

            async def watched() -> Tally:
                events = 0
                async for event in engine.stream(strategy, PROMPT, **settings):
                    events += event.kind == "token"
                return Tally(_votes(event.outcome), events)

            yield watched if live else many if runs > 1 else vote

    return client


CLIENTS: dict[str, tuple[int, Callable[[int], contextlib.AbstractAsyncContextManager[Repetition]]]] = {
    "bare": (SAMPLES, _bare(SAMPLES)),
    "bare_n": (SAMPLES, bare_n),
    "bare_stream": (SAMPLES, bare_stream),
    "bare_chat": (SAMPLES, bare_chat),
    "bare_runs": (RUNS, _bare(RUNS)),
    "openai": (SAMPLES, openai_client),
    "its_hub": (SAMPLES, its_hub),
    "orchestra": (SAMPLES, _orchestra("sglang://127.0.0.1:{port}?n=off")),
    "orchestra_n": (SAMPLES, _orchestra("sglang://127.0.0.1:{port}")),
    "orchestra_stream": (SAMPLES, _orchestra("sglang://127.0.0.1:{port}?n=off&interval=1", live=True)),
    "orchestra_openai": (SAMPLES, _orchestra("openai://127.0.0.1:{port}/v1?model=fake&n=off")),
    "orchestra_openai_n": (SAMPLES, _orchestra("openai://127.0.0.1:{port}/v1?model=fake")),
    "orchestra_runs": (RUNS, _orchestra("sglang://127.0.0.1:{port}", "sample", RUNS)),
}
"""By name: completions of a repetition, and what opens the client."""


def _say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def _version(name: str) -> str:
    """Of a client that is a package; empty for the others."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Open a client, warm it up, and repeat for as long as lines come in."""
    name, port = sys.argv[1], int(sys.argv[2])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    expected, client = CLIENTS[name]

    async def measured(repetition: Repetition) -> dict[str, Any]:
        wall, cpu = time.perf_counter(), time.process_time()
        good, events = await repetition()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return {"wall": wall, "cpu": cpu, "completions": expected, "errors": expected - good, "events": events}

    with asyncio.Runner() as runner:
        opened = client(port)
        try:
            repetition = runner.run(opened.__aenter__())
            runner.run(measured(repetition))
            _say(ready=name, version=_version(name))
            for _ in sys.stdin:
                _say(**runner.run(measured(repetition)))
        except Exception as error:
            _say(error=f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            runner.run(opened.__aexit__(None, None, None))


if __name__ == "__main__":
    main()
