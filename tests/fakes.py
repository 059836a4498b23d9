"""Fake servers for the tests of remote engines: small HTTP handlers on loopback that count what reaches them."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Fake:
    """A fake server.

    Attributes:
        requests: method, path and JSON body of each request, in order.
        headers: of each request.
        running: handlers at work.
        made: connections made so far.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.running = 0
        self.port = 0
        self.made = 0
        self._seen: set[Any] = set()
        self._runner: web.ServerRunner | None = None

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bodies(self, path: str) -> list[Any]:
        """Bodies of the requests to a path."""
        return [body for _, at, body in self.requests if at == path]

    async def start(self) -> None:
        server = web.Server(self._handle, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport not in self._seen:
            self._seen.add(request.transport)
            self.made += 1
        self.running += 1
        try:
            raw = await request.read()
            self.requests.append((request.method, request.path, json.loads(raw) if raw else None))
            self.headers.append(dict(request.headers))
            return await self.handler(request)
        finally:
            self.running -= 1

    async def idle(self) -> None:
        """Wait until no handler is at work."""
        while self.running:  # noqa: ASYNC110 (the handlers are the events)
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Fake]:
    """A fake server that answers with `handler`."""
    fake = Fake(handler)
    await fake.start()
    try:
        yield fake
    finally:
        await fake.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- answers -----------------------------------------------------------------------------------------------------------


def in_turn(*answers: Handler) -> Handler:
    """Each request gets the next answer; the last one answers all others."""
    left = list(answers)

    async def handler(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    return handler


def says(body: Any, status: int = 200, **headers: str) -> Handler:
    """JSON, or bytes as they are."""

    async def handler(_: web.Request) -> web.StreamResponse:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(body=raw, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return handler


async def reset(request: web.Request) -> web.StreamResponse:
    """A TCP reset instead of an answer."""
    linger = struct.pack("ii", 1, 0)
    request.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    request.transport.abort()
    return web.Response()


async def silent(_: web.Request) -> web.StreamResponse:
    """No answer at all."""
    await asyncio.sleep(60)
    return web.Response()


def half(body: bytes) -> Handler:
    """The first half of an answer, then the end of the connection."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        request.transport.close()
        return response

    return handler


def stream(pieces: Sequence[bytes], *, pause: float = 0.0, broken: bool = False, status: int = 200) -> Handler:
    """Pieces one by one, with a pause before each and before the end; `broken`: reset after them."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for piece in pieces:
            await asyncio.sleep(pause)
            await response.write(piece)
        if broken:
            await asyncio.sleep(0.02)  # or the reset throws away what the client has not read
            return await reset(request)
        await asyncio.sleep(pause)
        return response

    return handler


def sse(*events: Any, done: bool = True) -> list[bytes]:
    """Server-sent events, a piece each."""
    pieces = [b"data: %b\n\n" % json.dumps(event).encode() for event in events]
    return [*pieces, b"data: [DONE]\n\n"] if done else pieces
