"""What engines behind HTTP do when a server breaks off, freezes or is not there: on a fake SGLang server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from fake_sglang import EOS, SAID, FakeSGLang, connected, said, score
from fakes import free_port, in_turn, says, serving

import orchestra
from orchestra.errors import EngineError, UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime import limits, remote, sglang
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Delta, Request, Sampling

TEXT = "yes, né 思 no"
IDS = said(TEXT)


@pytest.fixture(autouse=True)
def _streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short generations too: what breaks here are streams."""
    monkeypatch.setattr(sglang, "WHOLE_TOKENS", 0)


def rest(ids: list[int]) -> list[int]:
    """Goes on with `TEXT` after what of it the prompt holds."""
    return IDS[sum(i >= SAID for i in ids) :]


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_FIRST_DELAY", 0.004)


def once(server: FakeSGLang, chunk: int, **sampling: Any) -> tuple[Delta, list[Delta], Any]:
    """A generation as one delta, its deltas, and the server that saw it."""

    async def main() -> tuple[Delta, list[Delta], Any]:
        async with connected(server) as (fake, connection):
            engine, graph = connection.engine, ThreadGraph()
            root = graph.add(spans=[await engine.encode_prompt("go")])
            node = graph.add([Edge(root.id, len(root))])
            whole, parts = Delta(), []
            async for delta in engine.generate(Request(graph, node, Sampling(**sampling), chunk=chunk)):
                parts.append(delta)
                whole.merge(delta)
            assert engine.load().sampled_tokens == whole.count
            await engine.release(graph)
            return whole, parts, fake

    return asyncio.run(asyncio.wait_for(main(), 20))


# -- breaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("breaks", [[], [0], [1], [6], [7], [len(IDS)], [len(IDS) + 1], [3, 0, 4, 2]])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_a_broken_stream_goes_on_token_for_token(
    breaks: list[int], chunk: int, incremental: bool, temperature: float
) -> None:
    """Also inside a character; and every token has the model's own log-probability, however the server tells them."""
    server = FakeSGLang(rest, incremental=incremental, break_after=list(breaks))
    whole, parts, _ = once(server, chunk, temperature=temperature, logprobs=True, max_tokens=50)
    assert whole.text == TEXT
    assert whole.tokens == [*IDS, EOS]
    assert (whole.finish_reason, whole.eos, whole.cached_tokens) == ("stop", True, 3)
    assert whole.logprobs == [score(i) for i in whole.tokens]
    if chunk == 0:
        assert len(parts) == 1


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("most", [3, 7, len(IDS)])
def test_a_stream_that_broke_after_its_last_token_is_whole(most: int, chunk: int, incremental: bool) -> None:
    """The end was not told any more: here the server says `length` one token later than it says the token."""

    class Late(FakeSGLang):
        def _event(self, answer: list[int], k: int, *more: Any) -> dict[str, Any]:
            event = super()._event(answer, k, *more)
            event["meta_info"]["finish_reason"] = None
            return event

    server = Late(rest, incremental=incremental, break_after=[most])
    whole, _, fake = once(server, chunk, max_tokens=most, logprobs=True, temperature=0.5)
    assert (whole.tokens, whole.finish_reason) == (IDS[:most], "length")
    assert whole.logprobs == [score(i) for i in IDS[:most]]
    assert TEXT.startswith(whole.text.rstrip("\ufffd"))
    assert len([body for body in fake.bodies("/generate") if body.get("stream")]) == 1


@pytest.mark.parametrize("breaks", [[2], [3], [1, 2], [0, 2]])
@pytest.mark.parametrize("chunk", [0, 1])
def test_a_stop_that_stands_across_a_break_is_found(breaks: list[int], chunk: int) -> None:
    """After a break the server looks for stops in what is new only (this one knows none), and goes on past it."""
    whole, _, _ = once(FakeSGLang(rest, break_after=list(breaks)), chunk, stop=("es,", "no"), max_tokens=50)
    assert (whole.text, whole.matched, whole.finish_reason, whole.eos) == ("yes,", "es,", "stop", False)
    assert whole.tokens == IDS[:4]


def test_some_of_a_group_go_on_alone_after_a_break() -> None:
    async def main() -> None:
        async with connected(FakeSGLang(rest, break_after=[3])) as (fake, connection):
            outcome = await connection.run("self_consistency(samples=4)", "go")
            assert [candidate.text for candidate in outcome.candidates] == [TEXT] * 4
            assert outcome.usage.sampled_tokens == 4 * len([*IDS, EOS])
            assert outcome.usage.cached_tokens == 4 * 3
            assert [body["sampling_params"]["n"] for body in fake.bodies("/generate")] == [4, 1, 1, 1, 1]
            assert len({str(body["rid"]) for body in fake.bodies("/generate")}) == 5

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize(("samples", "breaks"), [(1, []), (1, [0, 0]), (4, []), (4, [0])])
def test_short_answers_that_nobody_watches_come_whole(samples: int, breaks: list[int], monkeypatch) -> None:
    monkeypatch.setattr(sglang, "WHOLE_TOKENS", 1024)

    async def main() -> None:
        async with connected(FakeSGLang(rest, break_after=list(breaks))) as (fake, connection):
            outcome = await connection.run(f"self_consistency(samples={samples})", "go", max_tokens=1024)
            assert [candidate.text for candidate in outcome.candidates] == [TEXT] * samples
            assert outcome.usage.sampled_tokens == samples * len([*IDS, EOS])
            asked = [(body["stream"], body["sampling_params"]["n"]) for body in fake.bodies("/generate")]
            assert asked == [(False, samples)] * (1 + len(breaks))
            await connection.run("sample", "go", max_tokens=1025)
            assert fake.bodies("/generate")[-1]["stream"] is True

    asyncio.run(asyncio.wait_for(main(), 20))


def test_connections_are_used_again() -> None:
    async def main() -> None:
        async with connected(FakeSGLang(rest)) as (fake, connection):
            for _ in range(6):
                await connection.run("sample", "go")
            assert fake.made <= 2

    asyncio.run(asyncio.wait_for(main(), 20))


# -- frozen, dead, wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("live", [True, False])
def test_a_frozen_server_does_not_hold_up_a_cancel(live: bool, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_ABORT_SECONDS", 0.3)

    async def main() -> None:
        async with connected(FakeSGLang(rest, frozen=True)) as (fake, connection):

            async def work() -> None:
                if not live:
                    await connection.run(f"self_consistency(samples={samples})", "go")
                async for _ in connection.stream(f"self_consistency(samples={samples})", "go"):
                    pass

            task = asyncio.create_task(work())
            while not fake.bodies("/generate"):  # noqa: ASYNC110 (the server is the event)
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            began = time.monotonic()
            task.cancel()
            await asyncio.wait([task])
            assert time.monotonic() - began < 10, "not the time-out of 300 seconds"
            await asyncio.wait_for(fake.idle(), 5)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_server_that_is_not_there_is_an_error_at_once() -> None:
    began = time.monotonic()
    for scheme in ("sglang", "openai"):
        port = free_port()
        with pytest.raises(EngineError, match=rf"^cannot reach {scheme}://127.0.0.1:{port}.*; is a server running"):
            orchestra.run("sample", "x", engine=f"{scheme}://127.0.0.1:{port}")
    assert time.monotonic() - began < 10


def test_an_engine_that_could_not_be_opened_can_be_opened_later() -> None:
    async def main() -> None:
        port = free_port()
        engine = open_engine(f"sglang://127.0.0.1:{port}")
        for error in await asyncio.gather(*(engine.open() for _ in range(5)), return_exceptions=True):
            assert isinstance(error, EngineError)
        async with serving(FakeSGLang()) as fake:
            other = open_engine(f"sglang://127.0.0.1:{fake.port}")
            await asyncio.gather(*(other.open() for _ in range(5)))
            assert sum(path == "/v1/models" for _, path, _ in fake.requests) == 1, "it is met once"
            await other.close()
            with pytest.raises(EngineError, match="is closed"):
                await other.open()
        await engine.close()

    asyncio.run(asyncio.wait_for(main(), 20))


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (says({"data": [{"id": "x"}]}), UsageError, r"is no SGLang server; an OpenAI-compatible one is openai://"),
        (says({"data": []}), EngineError, "does not answer like an SGLang server"),
        (says([1]), EngineError, "does not answer like an SGLang server"),
        (says(b"<html>", 200), EngineError, "it sent what is not JSON"),
        (says({"detail": "Not Found"}, 404), EngineError, "does not answer as expected: Not Found"),
        (says({"error": "no"}, 401), EngineError, "no"),
    ],
)
def test_another_server_is_told_apart(answer: Any, kind: type, message: str) -> None:
    handler = in_turn(answer, says({"detail": "Not Found"}, 404))

    async def main() -> None:
        async with serving(handler) as fake:
            engine = open_engine(f"sglang://127.0.0.1:{fake.port}")
            with pytest.raises(kind, match=message) as error:
                await engine.open()
            assert "\n" not in str(error.value)
            assert engine.server.sockets == 0
            await engine.close()

    asyncio.run(asyncio.wait_for(main(), 20))
