"""A proxy that breaks HTTP on purpose, over real sockets, to test clients of servers.

    async with ChaosProxy(server_port, fault="reset", rate=0.2, seed=0) as proxy:
        connect(f"sglang://127.0.0.1:{proxy.port}")

Each POST to one of `paths` is struck with probability `rate`; all else passes byte for byte, as it comes. What happens
to whom is a function of the seed and of the order in which requests arrive.

| fault | what the client sees |
|---|---|
| `reset` | a TCP reset: before the request is passed on, when the server has answered, or in the middle of the answer |
| `half` | the first half of the answer, then an orderly close (of a stream: some events, no terminating chunk) |
| `stall` | the beginning of the answer, then nothing for ever |
| `429` | too many requests; Retry-After is 0, 1, 0.5 or missing |
| `500` | status 500, 502 or 503 |
| `malformed` | a whole answer whose JSON, or one event of which, is broken or not UTF-8 |
| `slow` | the right answer, its first bytes one by one: not an error |
| `none` | the right answer |
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Self

from chaos_wire import Broken, Framing, Head, Peer, Wire, json_starts, raw

FAULTS = ("reset", "half", "stall", "429", "500", "malformed", "slow", "none")
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
_SETTLE = 0.02  # seconds for bytes to reach the client before a reset throws away what it has not read
_DEPTHS = (0, 1, 7)  # events of a stream that pass before it is broken
_REASONS = {429: "Too Many Requests", 500: "Internal Server Error", 502: "Bad Gateway", 503: "Service Unavailable"}


class ChaosProxy:
    """The proxy, on the running loop, on loopback.

    Args:
        target: port of the server.
        fault: one of `FAULTS`, or several to draw from; may be changed while it runs, and so may `rate`.
        rate: probability that a request is struck.
        seed: of all that is drawn.
        paths: whose POSTs may be struck.
        slow_bytes, slow_delay: how many bytes of a slow answer come one by one, and seconds before each.

    Attributes:
        port: where it listens, the same after a restart.
        requests: POSTs to `paths` so far.
        faults: by kind, how often a request was struck (`none` is not counted).
        connections: open connections from clients.
        upstream: open connections to the server.
    """

    def __init__(
        self,
        target: int,
        *,
        fault: str | Sequence[str] = "none",
        rate: float = 1.0,
        seed: int = 0,
        paths: Sequence[str] = PATHS,
        slow_bytes: int = 400,
        slow_delay: float = 0.001,
    ) -> None:
        self.target, self.paths, self.rate = target, tuple(paths), rate
        self.fault = fault
        self.slow_bytes, self.slow_delay = slow_bytes, slow_delay
        self.port = 0
        self.requests = self.connections = self.upstream = 0
        self.faults: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def fault(self) -> tuple[str, ...]:
        """The faults to draw from."""
        return self._fault

    @fault.setter
    def fault(self, fault: str | Sequence[str]) -> None:
        self._fault = (fault,) if isinstance(fault, str) else tuple(fault)
        if unknown := set(self._fault) - set(FAULTS):
            raise ValueError(f"no fault {', '.join(sorted(unknown))}: there are {', '.join(FAULTS)}")

    async def __aenter__(self) -> Self:
        await self.start_accepting()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop_accepting()

    async def start_accepting(self) -> None:
        """Listen, at the old port if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Peer(self._accept), "127.0.0.1", self.port, backlog=4096, reuse_address=True
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop_accepting(self, reset: bool = True) -> None:
        """Be a dead server: new connections are refused, open ones are reset unless `reset` is false."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if reset:
            tasks = list(self._open)
            for task, writer in list(self._open.items()):
                _linger(writer)
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def draw(self, method: str, path: str) -> tuple[str, random.Random]:
        """The fault of a request, and a source of chance of its own: others that run beside it do not disturb it."""
        if method != "POST" or path.partition("?")[0] not in self.paths:
            return "none", self._random
        self.requests += 1
        struck, own = self._random.random() < self.rate, random.Random(self._random.getrandbits(64))
        return own.choice(self._fault) if struck else "none", own

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open[task] = writer
        self.connections += 1
        peer = writer.transport.get_protocol()
        assert isinstance(peer, Peer)
        peer.on_gone = task.cancel
        connection = _Connection(self, reader, writer)
        try:
            await connection.run()
            writer.close()
        except Broken:
            writer.close()
        except ConnectionError:  # of the server: what happened to us happens to the client
            _linger(writer)
            writer.transport.abort()
        except asyncio.CancelledError:  # the client has gone, or the proxy is stopped: either way this was all
            writer.transport.abort()
        finally:
            connection.leave()
            self.connections -= 1
            del self._open[task]


class _Connection:
    """One client's connection, and the one to the server that serves it."""

    def __init__(self, proxy: ChaosProxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy, self.client, self.writer = proxy, Wire(reader), writer
        self.server: Wire | None = None
        self.peer: Peer | None = None
        self.out: asyncio.Transport | None = None
        self.idle = True

    async def run(self) -> None:
        """Serve requests until somebody closes."""
        while (head := await self.client.head()) is not None:
            self.idle = False
            body = [piece async for piece, _ in self.client.pieces(head.request_body())]
            fault, chance = self.proxy.draw(*head.start[:2])
            if fault in ("429", "500"):
                await self.send(self.refusal(fault, chance))
            elif not await self.serve(head, b"".join([head.raw, *body]), fault, chance):
                return
            self.idle = True
            if self.peer is not None and self.peer.gone:
                return

    def leave(self) -> None:
        """Close the connection to the server at once: this is how it learns that its client has gone."""
        if self.out is not None:
            self.out.abort()

    async def serve(self, request: Head, sent: bytes, fault: str, chance: random.Random) -> bool:
        """Pass a request on and its answer back, with a fault; whether the connection can go on."""
        moment = chance.randrange(3) if fault == "reset" else None
        if moment == 0:
            return self.reset()
        await self.connect()
        assert self.server is not None
        assert self.out is not None
        self.out.write(sent)
        while (head := await self.server.head()) is not None and head.start[1].startswith("1"):
            await self.send(head.raw)
        if head is None:
            return False
        if moment == 1:
            return self.reset()
        framing = head.response_body(request.start[0])
        pieces = self.server.pieces(framing)
        if moment == 2 or fault in ("half", "stall"):
            await self.send(head.raw if not framing.done else head.raw[: len(head.raw) // 2])
            async for piece in _beginning(pieces, head, framing, chance):
                await self.send(piece)
            if moment == 2:
                await asyncio.sleep(_SETTLE)
                return self.reset()
            self.proxy.faults[fault] += 1
            if fault == "stall":
                await asyncio.Event().wait()
            return False
        body = self.spoiled(pieces, head, framing, chance) if fault == "malformed" else raw(pieces)
        slow_left = self.proxy.slow_bytes if fault == "slow" else 0
        self.proxy.faults.update(["slow"] if slow_left else [])
        slow_left = await self.send_slowly(head.raw, slow_left)
        async for piece in body:
            slow_left = await self.send_slowly(piece, slow_left)
        return not framing.ends_by_close

    async def connect(self) -> None:
        """Connect to the server, unless that was done for an earlier request."""
        if self.out is not None:
            return
        loop = asyncio.get_running_loop()
        transport, peer = await loop.create_connection(Peer, "127.0.0.1", self.proxy.target)
        self.out, self.peer, self.server = transport, peer, Wire(peer.reader)
        self.proxy.upstream += 1
        peer.on_gone = self.server_gone

    def server_gone(self) -> None:
        """The server has closed: what it sent is passed on; a client that asks for nothing now learns it at once."""
        self.proxy.upstream -= 1
        if self.idle:
            self.writer.close()

    async def send(self, data: bytes) -> None:
        """To the client."""
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> bool:
        """Reset the client's connection; the connection cannot go on."""
        self.proxy.faults["reset"] += 1
        _linger(self.writer)
        self.writer.transport.abort()
        return False

    def refusal(self, fault: str, chance: random.Random) -> bytes:
        """An answer with an error's status."""
        self.proxy.faults[fault] += 1
        status = 429 if fault == "429" else chance.choice((500, 502, 503))
        after = chance.choice(("0", "1", "0.5", None)) if fault == "429" else None
        body = b'{"error":{"message":"%b"}}' % _REASONS[status].encode()
        fields = [f"Content-Length: {len(body)}", "Content-Type: application/json"]
        fields += [f"Retry-After: {after}"] if after is not None else []
        return "\r\n".join([f"HTTP/1.1 {status} {_REASONS[status]}", *fields, "", ""]).encode() + body

    async def send_slowly(self, data: bytes, count: int) -> int:
        """To the client, the first `count` bytes one by one; returns how many of these are left."""
        for i in range(min(count, len(data))):
            await asyncio.sleep(self.proxy.slow_delay)
            await self.send(data[i : i + 1])
        await self.send(data[count:])
        return max(0, count - len(data))

    async def spoiled(
        self, pieces: AsyncIterator[tuple[bytes, list[slice]]], head: Head, framing: Framing, chance: random.Random
    ) -> AsyncIterator[bytes]:
        """The same number of bytes, one of which makes the body, or one of its events, unreadable."""
        skip, spoiled = chance.choice(_DEPTHS) if head.streams else 0, False
        async for piece, data in pieces:
            places = json_starts(piece, data, head.streams)
            if not spoiled and places and (skip < len(places) or framing.done or b"[DONE]" in piece):
                place = places[min(skip, len(places) - 1)]
                wrong = b"\xff" if chance.random() < 0.5 else b"#"
                piece, spoiled = piece[:place] + wrong + piece[place + 1 :], True
                self.proxy.faults["malformed"] += 1
            skip -= len(places)
            yield piece


def _linger(writer: asyncio.StreamWriter) -> None:
    """Let the coming close be a reset."""
    with contextlib.suppress(OSError):  # closed already
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def _beginning(
    pieces: AsyncIterator[tuple[bytes, list[slice]]], head: Head, framing: Framing, chance: random.Random
) -> AsyncIterator[bytes]:
    """A body up to its middle; of one whose length nobody knows, some pieces and half of the next."""
    left = (framing.length or 0) // 2
    depth = chance.choice(_DEPTHS) if head.streams else 0
    async for piece, _ in pieces:
        if framing.length is not None:
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return
        elif depth <= 0 or framing.done or b"[DONE]" in piece:
            yield piece[: len(piece) // 2]
            return
        else:
            yield piece
            depth -= 1
