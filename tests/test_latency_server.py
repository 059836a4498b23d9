"""The fake server that client overhead is measured against: its timing, its shapes, and that it forgets who left."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import aiohttp
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import latency_server

META = {  # of SGLang 0.5.20, from a real server
    "id",
    "finish_reason",
    "prompt_tokens",
    "weight_version",
    "num_retractions",
    "reasoning_tokens",
    "completion_tokens",
    "cached_tokens",
    "cached_tokens_details",
    "dp_rank",
}
LAST = {"weight_versions", "e2e_latency"}
IDS = list(range(10, 20))


@pytest.fixture(scope="module")
def port():
    with latency_server.running() as port:
        yield port


@asynccontextmanager
async def opened(port):
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session


async def post(session, path, **body):
    async with session.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        return json.loads(await response.read() or b"null")


async def events(session, path, **body):
    async with session.post(path, json={"stream": True, **body}) as response:
        assert response.content_type == "text/event-stream"
        lines = (await response.read()).decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def running(session):
    async with session.get("/v1/loads") as response:
        (load,) = (await response.json())["loads"]
    return load["num_running_reqs"]


async def until_running(session, count):
    async with asyncio.timeout(2):
        while await running(session) != count:  # noqa: ASYNC110 - the server has no event to wait for
            await asyncio.sleep(0.005)


def test_a_generation_takes_205_ms_however_many_run(port):
    async def main():
        async with opened(port) as session:
            start = time.perf_counter()
            answers = await asyncio.gather(*(post(session, "/generate", input_ids=IDS, rid=f"a{i}") for i in range(40)))
            seconds = time.perf_counter() - start
        assert 0.205 <= seconds < 1.0
        for i, answer in enumerate(answers):
            assert answer["text"].endswith("\\boxed{42}")
            assert len(answer["output_ids"]) == 100
            meta = answer["meta_info"]
            assert set(meta) == META | LAST | {"response_sent_to_client_ts"}
            assert (meta["id"], meta["prompt_tokens"]) == (f"a{i}", 10)
            assert meta["finish_reason"] == {"type": "stop", "matched": 2}

    asyncio.run(main())


def test_n_and_batches_give_lists(port):
    async def main():
        async with opened(port) as session:
            several = await post(
                session, "/generate", rid="x", text="hi", sampling_params={"n": 3, "max_new_tokens": 4}
            )
            batch = await post(
                session, "/generate", rid=["y", "z"], input_ids=[IDS, IDS[:3]], sampling_params={"max_new_tokens": 4}
            )
        assert len({one["meta_info"]["id"] for one in several} - {"x"}) == 3
        assert [one["meta_info"]["finish_reason"] for one in several] == [{"type": "length", "length": 4}] * 3
        assert [(one["meta_info"]["id"], one["meta_info"]["prompt_tokens"]) for one in batch] == [("y", 10), ("z", 3)]

    asyncio.run(main())


@pytest.mark.parametrize(("interval", "counts"), [(1, [*range(1, 101)]), (16, [*range(1, 101, 16), 100])])
def test_streams_are_cumulative(port, interval, counts):
    async def main():
        async with opened(port) as session:
            chunks = await events(session, "/generate", input_ids=IDS, sampling_params={"stream_interval": interval})
        assert [len(chunk["output_ids"]) for chunk in chunks] == counts
        assert all(later["text"].startswith(one["text"]) for one, later in pairwise(chunks))
        assert all(set(chunk["meta_info"]) - {"response_sent_to_client_ts"} == META for chunk in chunks[:-1])
        assert set(chunks[-1]["meta_info"]) == META | LAST
        assert chunks[-1]["text"].endswith("\\boxed{42}")

    asyncio.run(main())


def test_streams_of_several_say_which(port):
    async def main():
        async with opened(port) as session:
            chunks = await events(session, "/generate", input_ids=IDS, sampling_params={"n": 2, "max_new_tokens": 3})
        assert sorted((chunk["index"], chunk["meta_info"]["completion_tokens"]) for chunk in chunks) == [
            (index, tokens) for index in (0, 1) for tokens in (1, 2, 3)
        ]

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_an_abort_gives_what_there_is(port, stream):
    async def main():
        async with opened(port) as session:
            ask = events if stream else post
            task = asyncio.create_task(ask(session, "/generate", input_ids=IDS, rid="gone"))
            await until_running(session, 1)
            await asyncio.sleep(0.05)
            assert await post(session, "/abort_request", rid="gone") is None
            answer = (await task)[-1] if stream else await task
            assert answer["meta_info"]["finish_reason"]["type"] == "abort"
            assert 0 < len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < 100
            assert await running(session) == 0

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_work(port, stream):
    async def main():
        async with opened(port) as session:
            body = {"input_ids": IDS, "stream": stream, "sampling_params": {"n": 5}}
            task = asyncio.create_task(post(session, "/generate", **body))
            await until_running(session, 5)
            task.cancel()
            start = time.perf_counter()
            await until_running(session, 0)
            assert time.perf_counter() - start < 0.1

    asyncio.run(main())


def test_tokens_and_text(port):
    async def main():
        async with opened(port) as session:
            text = await post(session, "/v1/tokenize", prompt="häß")
            assert (text["tokens"][0], text["count"]) == (1, 6)
            chat = await post(session, "/v1/tokenize", messages=[{"role": "user", "content": "hi"}])
            answer = await post(session, "/generate", input_ids=chat["tokens"])
            for tokens, expected in [
                (text["tokens"], "häß"),
                (chat["tokens"], "user: hi\nassistant:"),
                (answer["output_ids"], answer["text"]),
                ([[50065], [50066, 2]], ["A", "B"]),
            ]:
                assert (await post(session, "/v1/detokenize", tokens=tokens))["text"] == expected

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "prompt"),
    [("chat/completions", {"messages": [{"role": "user", "content": "x"}]}), ("completions", {"prompt": "x"})],
)
def test_openai(port, path, prompt):
    """Through OpenAI's own client, which checks the shapes."""
    openai = pytest.importorskip("openai")

    async def main():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            create = client.chat.completions.create if "chat" in path else client.completions.create
            whole = await create(model="fake", n=2, **prompt)
            assert whole.usage.completion_tokens == 200
            for choice in whole.choices:
                text = choice.message.content if "chat" in path else choice.text
                assert text.endswith("\\boxed{42}")
                assert choice.finish_reason == "stop"
            pieces, reasons, usage = {0: "", 1: ""}, {}, None
            stream = await create(model="fake", n=2, stream=True, stream_options={"include_usage": True}, **prompt)
            async for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    pieces[choice.index] += (choice.delta.content or "") if "chat" in path else choice.text
                    reasons[choice.index] = choice.finish_reason or reasons.get(choice.index)
            assert pieces == {0: text, 1: text}
            assert reasons == {0: "stop", 1: "stop"}
            assert usage.completion_tokens == 200
            assert (await client.models.list()).data[0].id == "fake"

    asyncio.run(main())


@pytest.mark.parametrize(
    "body", [{}, {"text": "x", "input_ids": [1]}, {"text": "x", "sampling_params": {"max_new_tokens": -1}}, [1]]
)
def test_bad_requests_are_refused(port, body):
    async def main():
        async with opened(port) as session, session.post("/generate", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["message"]

    asyncio.run(main())
