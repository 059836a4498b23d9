"""The fault proxy does each fault, and nothing else."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise

import aiohttp
import pytest
from aiohttp import web
from chaos import FAULTS, ChaosProxy
from chaos_wire import Framing

ANSWER = {"text": "what the server says " * 20}
EVENTS = [{"text": "x" * k} for k in range(1, 21)]


class App:
    """A small server that knows what runs on it."""

    def __init__(self) -> None:
        self.running = 0
        self.connections: set[asyncio.BaseTransport] = set()
        self.bodies: list[bytes] = []
        self.aborted: list[str] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        self.connections.add(request.transport)
        self.running += 1
        try:
            self.bodies.append(await request.read())
            if "hang" in request.query:
                await asyncio.sleep(60)
            if "stream" not in request.query:
                return web.json_response(ANSWER)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for event in EVENTS:
                await response.write(b"data: %b\n\n" % json.dumps(event).encode())
                await asyncio.sleep(float(request.query.get("pause", 0.001)))
            await response.write(b"data: [DONE]\n\n")
            return response
        finally:
            self.running -= 1

    async def abort(self, request: web.Request) -> web.Response:
        self.aborted.append((await request.json())["rid"])
        return web.Response()

    async def echo(self, request: web.Request) -> web.Response:
        return web.Response(body=await request.read(), headers={"X-Path": request.path_qs})


@asynccontextmanager
async def opened(**options):
    """The server, a proxy before it, and a client's session through the proxy."""
    app, application = App(), web.Application(client_max_size=2**26)
    application.add_routes(
        [web.post("/generate", app.generate), web.post("/abort_request", app.abort), web.route("*", "/echo", app.echo)]
    )
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with (
            asyncio.timeout(30),
            ChaosProxy(runner.addresses[0][1], **options) as proxy,
            aiohttp.ClientSession(f"http://127.0.0.1:{proxy.port}", connector=aiohttp.TCPConnector(limit=0)) as session,
        ):
            yield app, proxy, session
    finally:
        await runner.cleanup()


async def post(session, query="", path="/generate"):
    async with session.post(path + query, json={"rid": "r"}) as response:
        return response.status, await response.read()


async def raw(port, query="", close=True):
    """All bytes that a plain socket gets for one request, and the error that ended it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    end = "Connection: close\r\n" if close else ""
    writer.write(f"POST /generate{query} HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n{end}\r\n{{}}".encode())
    got, error = b"", None
    try:
        while piece := await reader.read(2**16):
            got += piece
    except ConnectionResetError as reset:
        error = reset
    finally:
        writer.close()
    return got, error


async def until(condition, seconds=2.0):
    start = time.perf_counter()
    while not condition():
        assert time.perf_counter() - start < seconds, "in vain"
        await asyncio.sleep(0.002)


def events(data):
    return [line.removeprefix(b"data: ") for line in data.split(b"\n\n") if line]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_struck_passes_byte_for_byte(fault):
    async def main():
        async with opened(fault=fault, rate=0.0) as (app, proxy, session):
            chance = random.Random(1)
            for size in (0, 1, 100_000, 900_000):
                sent = chance.randbytes(size)
                async with session.post("/echo?a=b%20c", data=sent) as response:
                    assert await response.read() == sent
                    assert response.headers["X-Path"] == "/echo?a=b%20c"
            async with session.post("/echo", data=_parts()) as response:  # a chunked request
                assert await response.read() == b"onetwothree"
            for method in ("GET", "HEAD", "PUT", "DELETE"):
                async with session.request(method, "/echo") as response:
                    assert (response.status, await response.read()) == (200, b"")
            direct, _ = await raw(proxy.target, "?stream=1")
            through, _ = await raw(proxy.port, "?stream=1")
            strip = [[line for line in one.split(b"\r\n") if b"Date" not in line] for one in (direct, through)]
            assert strip[0] == strip[1]
            assert (await post(session))[1] == json.dumps(ANSWER).encode()
            assert app.bodies == [b"{}", b"{}", b'{"rid": "r"}']
            assert (proxy.requests, proxy.faults) == (2, Counter())

    asyncio.run(main())


async def _parts():
    for part in (b"one", b"two", b"three"):
        yield part


def test_streams_pass_event_by_event():
    async def main():
        async with opened() as (_, _, session), session.post("/generate?stream=1&pause=0.03") as response:
            arrivals = [time.perf_counter() async for line in response.content if line.startswith(b"data")]
            gaps = [later - one for one, later in pairwise(arrivals)]
            assert len(arrivals) == len(EVENTS) + 1
            assert sum(gap > 0.01 for gap in gaps) > len(gaps) * 0.8

    asyncio.run(main())


def test_a_client_that_leaves_is_gone_upstream_at_once():
    async def main():
        async with opened() as (app, proxy, session):
            for query in ("?hang=1", "?stream=1&pause=1"):
                task = asyncio.create_task(post(session, query))
                await until(lambda: app.running == 1 and proxy.upstream == 1)
                task.cancel()
                start = time.perf_counter()
                await until(lambda: app.running == 0 and proxy.upstream == 0 and proxy.connections == 0)
                assert time.perf_counter() - start < 0.2

    asyncio.run(main())


def test_aborts_pass_beside_a_stalled_request():
    async def main():
        async with opened(fault="stall") as (app, proxy, session):
            task = asyncio.create_task(post(session))
            await until(lambda: proxy.faults["stall"] == 1)
            await post(session, path="/abort_request")
            assert app.aborted == ["r"]
            assert not task.done()
            task.cancel()

    asyncio.run(main())


def test_connections_are_kept():
    async def main():
        async with opened() as (app, proxy, session):
            for _ in range(10):
                assert (await post(session))[0] == 200
            assert (len(app.connections), proxy.connections, proxy.upstream) == (1, 1, 1)

    asyncio.run(main())


@pytest.mark.parametrize("query", ["", "?stream=1"])
def test_reset(query):
    async def main():
        async with opened(fault="reset") as (app, proxy, session):
            kinds = Counter()
            for _ in range(24):
                got, error = await raw(proxy.port, query, close=False)
                assert isinstance(error, ConnectionResetError)
                assert json.dumps(ANSWER).encode() not in got
                assert b"[DONE]" not in got
                kinds[bool(got)] += 1
            assert min(kinds.values()) > 3
            assert len(app.bodies) < 24  # some were reset before they were passed on
            with pytest.raises(aiohttp.ClientError):
                await post(session, query)
            assert proxy.faults == Counter(reset=25)
            await until(lambda: app.running == proxy.upstream == 0)

    asyncio.run(main())


def test_half():
    async def main():
        async with opened(fault="half") as (_, proxy, session):
            got, error = await raw(proxy.port)
            body = json.dumps(ANSWER).encode()
            assert error is None
            assert got.partition(b"\r\n\r\n")[2] == body[: len(body) // 2]
            seen = set()
            for _ in range(12):
                got, error = await raw(proxy.port, "?stream=1")
                assert error is None
                assert not got.endswith(b"0\r\n\r\n")
                assert not _reads(got.rpartition(b"data: ")[2].strip())  # its last event is cut
                seen.add(got.count(b"data"))
            assert len(seen) > 1
            for query in ("", "?stream=1"):
                with pytest.raises(aiohttp.ClientPayloadError):
                    await post(session, query)
            assert proxy.faults == Counter(half=15)

    asyncio.run(main())


@pytest.mark.parametrize("query", ["", "?stream=1"])
def test_stall(query):
    async def main():
        async with opened(fault="stall") as (app, proxy, session):
            async with session.post("/generate" + query) as response:
                assert await response.content.readany()
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.3):
                        await response.read()
                assert (proxy.connections, proxy.upstream) == (1, 1)
            await until(lambda: proxy.connections == proxy.upstream == app.running == 0)
            assert proxy.faults == Counter(stall=1)

    asyncio.run(main())


def test_statuses():
    async def main():
        async with opened(fault="429") as (app, proxy, session):
            seen = set()
            for _ in range(40):
                async with session.post("/generate") as response:
                    assert response.status == 429
                    seen.add(response.headers.get("Retry-After"))
                    assert (await response.json())["error"]["message"]
            assert seen == {"0", "1", "0.5", None}
            proxy.fault = "500"
            assert {(await post(session))[0] for _ in range(40)} == {500, 502, 503}
            assert proxy.faults == {"429": 40, "500": 40}
            assert not app.bodies
            assert proxy.connections == 1  # such an answer does not end the connection

    asyncio.run(main())


def test_malformed():
    async def main():
        async with opened(fault="malformed") as (_, proxy, session):
            errors = Counter()
            for _ in range(20):
                _, body = await post(session)
                assert len(body) == len(json.dumps(ANSWER))
                with pytest.raises(ValueError, match=r"codec|Expecting") as error:
                    json.loads(body)
                errors[type(error.value)] += 1
                _, body = await post(session, "?stream=1")
                *lines, done = events(body)
                assert done == b"[DONE]"
                assert len(lines) == len(EVENTS)
                readable = [line for line in lines if _reads(line)]
                assert len(readable) == len(EVENTS) - 1
            assert set(errors) == {json.JSONDecodeError, UnicodeDecodeError}
            assert proxy.faults == Counter(malformed=40)

    asyncio.run(main())


def _reads(line):
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("query", ["", "?stream=1"])
def test_slow_is_right(query):
    async def main():
        async with opened(fault="slow", slow_bytes=150) as (_, proxy, session):
            slow = await post(session, query)
            assert proxy.faults == Counter(slow=1)
            proxy.fault = "none"
            assert await post(session, query) == slow
            proxy.fault, start = "slow", time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
            pieces = [await reader.read(1000) for _ in range(20)]
            assert sum(map(len, pieces)) < 60
            assert time.perf_counter() - start > 0.015
            writer.close()

    asyncio.run(main())


def test_the_rate_is_kept_and_the_seed_decides():
    async def main(seed):
        async with opened(fault=("500", "429"), rate=0.3, seed=seed) as (_, proxy, session):
            statuses = [(await post(session))[0] for _ in range(200)]
            assert 40 < sum(status != 200 for status in statuses) < 80
            assert sum(proxy.faults.values()) == sum(status != 200 for status in statuses)
            assert set(proxy.faults) == {"500", "429"}
            proxy.rate = 0.0
            assert {(await post(session))[0] for _ in range(20)} == {200}
            return statuses

    first, again, other = (asyncio.run(main(seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_a_dead_server_and_its_return():
    async def main():
        async with opened() as (app, proxy, session):
            port = proxy.port
            await post(session)
            task = asyncio.create_task(post(session, "?hang=1"))
            await until(lambda: app.running == 1)
            await proxy.stop_accepting()
            with pytest.raises((aiohttp.ClientError, ConnectionResetError)):
                await task
            with pytest.raises(aiohttp.ClientConnectorError):
                await post(session)
            await until(lambda: app.running == proxy.connections == proxy.upstream == 0)
            await proxy.start_accepting()
            assert proxy.port == port
            assert (await post(session))[0] == 200

    asyncio.run(main())


def test_many_at_once():
    async def main():
        async with opened(fault=("reset", "half", "500", "malformed"), rate=0.5) as (app, proxy, session):
            answers = await asyncio.gather(
                *(post(session, "?stream=1" if i % 2 else "") for i in range(200)), return_exceptions=True
            )
            right = [a for a in answers if isinstance(a, tuple) and a[0] == 200 and all(map(_reads, _json(a[1])))]
            assert len(right) == 200 - sum(proxy.faults.values())
            await until(lambda: app.running == 0)

    asyncio.run(main())


def _json(body):
    return events(body)[:-1] if body.startswith(b"data") else [body]


def test_an_unknown_fault_is_refused():
    with pytest.raises(ValueError, match="no fault rest"):
        ChaosProxy(1, fault="rest")


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_framing_finds_body_data_however_it_is_cut(step):
    for framing, wire, expected in [
        (Framing(5), b"helloNEXT", b"hello"),
        (Framing(chunked=True), b"3;x=y\r\nabc\r\n0A\r\n0123456789\r\n0\r\nT: r\r\n\r\nNEXT", b"abc0123456789"),
        (Framing(0), b"NEXT", b""),
    ]:
        got, rest = b"", wire
        while not framing.done:
            piece, rest = rest[:step], rest[step:]
            got += b"".join(piece[part] for part in framing.feed(piece))
            rest = piece[framing.used :] + rest
        assert (got, rest) == (expected, b"NEXT")
