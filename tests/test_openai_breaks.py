"""Streams of plain OpenAI-compatible servers that break, and generations that nobody wants any more."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from fakes import Fake, serving
from plain_server import PlainServer

import orchestra
from orchestra import Outcome
from orchestra.errors import EngineError
from orchestra.runtime import limits as limits_module

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = [" one", " two", " three", " four", " five"]
MESSAGES = [{"role": "user", "content": "Count."}]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits_module, "_FIRST_DELAY", 0.004)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def counting(prompt: str) -> list[str]:
    """Goes on after as many words as the prompt holds."""
    return WORDS[sum(word in prompt for word in WORDS) :]


def run(server: PlainServer, prompt: Any = "Count:", query: str = "", **options: Any) -> tuple[Outcome, Fake]:
    async def main() -> tuple[Outcome, Fake]:
        async with serving(server) as fake:
            async with orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1{query}") as connection:
                events = [event async for event in connection.stream("sample", prompt, **options)]
                assert connection.engine.server.sockets == 0
                assert connection.engine.load().sampled_tokens == events[-1].outcome.usage.sampled_tokens
            shown = "".join(event.text for event in events if event.kind == "token")
            assert shown == events[-1].outcome.text
            return events[-1].outcome, fake

    return asyncio.run(asyncio.wait_for(main(), 20))


def prompts(fake: Fake) -> list[Any]:
    return [body["prompt"] for body in fake.bodies(TEXT) if "prompt" in body]


@pytest.mark.parametrize("breaks", [[0], [1], [4], [2, 1], [0, 0, 3]])
@pytest.mark.parametrize("most", [None, 20])
def test_a_broken_text_goes_on_where_it_stopped(breaks: list[int], most: int | None) -> None:
    outcome, fake = run(PlainServer(counting, break_after=list(breaks)), max_tokens=most)
    assert outcome.text == "".join(WORDS)
    assert (outcome.finish_reason, outcome.usage.requests) == ("stop", 1)
    assert outcome.usage.sampled_tokens == 6
    seen = [sum(breaks[:k]) for k in range(len(breaks) + 1)]
    assert prompts(fake) == ["Count:" + "".join(WORDS[:n]) for n in seen]
    if most is not None:
        assert [body["max_tokens"] for body in fake.bodies(TEXT) if "prompt" in body] == [most - n for n in seen]


@pytest.mark.parametrize(("break_at", "most"), [(3, 3), (5, 5)])
def test_a_text_that_broke_after_its_last_token_is_whole(break_at: int, most: int) -> None:
    """The end was not told any more, and there is nothing left to ask for."""
    outcome, fake = run(PlainServer(counting, break_after=[break_at]), max_tokens=most)
    assert outcome.text == "".join(WORDS[:most])
    assert outcome.finish_reason == "length"
    assert len(prompts(fake)) == 1


@pytest.mark.parametrize("break_at", [1, 4])
def test_a_chat_that_broke_after_tokens_were_shown_is_an_error(break_at: int) -> None:
    with pytest.raises(EngineError) as error:
        run(PlainServer(counting, break_after=[break_at]), MESSAGES)
    text = str(error.value)
    assert f"the connection broke after {break_at} tokens, and this server cannot go on from there" in text
    assert text.startswith("openai://127.0.0.1:")
    assert "\n" not in text


def test_a_chat_that_broke_before_its_first_token_is_tried_again() -> None:
    outcome, fake = run(PlainServer(counting, break_after=[0, 0]), MESSAGES)
    assert outcome.text == "".join(WORDS)
    assert len(fake.bodies(CHAT)) == 3


def test_a_stream_that_ended_without_done_has_ended() -> None:
    """The end of the generation was told; that the stream breaks off after it changes nothing."""

    class Rude(PlainServer):
        async def _send(self, response: Any, event: Any) -> None:
            await super()._send(response, event)
            if event["choices"] and event["choices"][0]["finish_reason"]:
                response._req.transport.close()

    for prompt in ("Count:", MESSAGES):
        outcome, fake = run(Rude(counting), prompt)
        assert (outcome.text, outcome.finish_reason) == ("".join(WORDS), "stop")
        assert len(fake.bodies(CHAT if prompt is MESSAGES else TEXT)) <= 2


def test_retries_end() -> None:
    with pytest.raises(EngineError, match=r"failed 3 times, the last time with: connection lost"):
        run(PlainServer(counting, break_after=[0] * 9), query="?retries=2")


# -- nobody wants it any more ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [True, False])
def test_cancelled_generations_end_on_the_server(live: bool) -> None:
    async def main() -> None:
        async with serving(PlainServer(lambda _: [" w"] * 1000, pause=0.05)) as fake:  # noqa: SIM117 (two lives)
            async with orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1") as connection:

                async def work() -> None:
                    if not live:
                        await connection.run("self_consistency(samples=5)", MESSAGES)
                    async for _ in connection.stream("self_consistency(samples=5)", MESSAGES):
                        pass

                task = asyncio.create_task(work())
                while fake.running < 5:  # noqa: ASYNC110 (the handlers are the events)
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.12)
                began = time.monotonic()
                task.cancel()
                await asyncio.wait([task])
                assert time.monotonic() - began < 5
                assert connection.engine.server.sockets == 0
                assert connection.engine.load().requests == 0
                await asyncio.wait_for(fake.idle(), 5)
                assert (await connection.run("sample", MESSAGES, max_tokens=2)).text == " w w"

    asyncio.run(asyncio.wait_for(main(), 20))


def test_waiting_requests_are_cancelled_without_being_sent() -> None:
    async def main() -> None:
        async with serving(PlainServer(lambda _: [" w"] * 1000, pause=0.05)) as fake:  # noqa: SIM117 (two lives)
            async with orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1?concurrency=2") as connection:
                task = asyncio.create_task(connection.run("self_consistency(samples=9)", MESSAGES))
                while fake.running < 2:  # noqa: ASYNC110 (the handlers are the events)
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.1)
                assert connection.engine.load().requests == 9
                task.cancel()
                await asyncio.wait([task])
                assert len(fake.bodies(CHAT)) == 2
                outcome = await connection.run("self_consistency(samples=4)", MESSAGES, max_tokens=1)
                assert outcome.usage.requests == 4, "all slots are there again"
                assert connection.engine.server.gate.held == 0

    asyncio.run(asyncio.wait_for(main(), 20))


def test_closing_ends_what_runs() -> None:
    async def main() -> None:
        async with serving(PlainServer(lambda _: [" w"] * 1000, pause=0.05)) as fake:
            connection = orchestra.connect(f"openai://127.0.0.1:{fake.port}/v1")
            await connection.__aenter__()
            task = asyncio.create_task(connection.run("self_consistency(samples=3)", MESSAGES))
            while fake.running < 3:  # noqa: ASYNC110 (the handlers are the events)
                await asyncio.sleep(0.01)
            await connection.close()
            await connection.close()
            outcome = await task
            assert {candidate.finish_reason for candidate in outcome.candidates} == {"cancelled"}
            await asyncio.wait_for(fake.idle(), 5)

    asyncio.run(asyncio.wait_for(main(), 20))
