"""Just enough HTTP/1.1 for the proxy in `chaos.py`: where messages end, and which of their bytes are body."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

_PIECE = 2**16


class Broken(Exception):
    """The connection ended inside a message."""


@dataclass(frozen=True, slots=True)
class Head:
    """A request's or response's first lines.

    Attributes:
        raw: as they came.
        start: the three parts of the first line.
        fields: header fields by name in lower case.
    """

    raw: bytes
    start: list[str]
    fields: dict[str, str]

    @property
    def streams(self) -> bool:
        """Whether it opens a stream of server-sent events."""
        return self.fields.get("content-type", "").startswith("text/event-stream")

    def request_body(self) -> Framing:
        """The framing of the body of this request."""
        return self._body(unsaid=0)

    def response_body(self, method: str) -> Framing:
        """The framing of the body of this response to a request with `method`."""
        if method == "HEAD" or self.start[1] in ("204", "304") or self.start[1].startswith("1"):
            return Framing(0)
        return self._body(unsaid=None)

    def _body(self, unsaid: int | None) -> Framing:
        if "chunked" in self.fields.get("transfer-encoding", ""):
            return Framing(chunked=True)
        length = self.fields.get("content-length")
        return Framing(unsaid if length is None else int(length))


class Framing:
    """Follows a body through its bytes.

    Args:
        length: bytes of it; None: until the connection closes.
        chunked: or in chunks.

    Attributes:
        done: the message has ended.
        used: bytes of the last piece that belong to it.
    """

    def __init__(self, length: int | None = None, chunked: bool = False) -> None:
        self.length = length
        self.ends_by_close = length is None and not chunked
        self.done = length == 0
        self.used = 0
        self._chunked = chunked
        self._expects = "size" if chunked else "data"  # data; or a line: size of a chunk, its end, or a trailer
        self._left = 2**62 if length is None else length
        self._line = b""

    def feed(self, piece: bytes) -> list[slice]:
        """Go on with `piece`; returns where in it body data lies."""
        data, at = [], 0
        while at < len(piece) and not self.done:
            if self._expects == "data":
                end = min(len(piece), at + self._left)
                data.append(slice(at, end))
                self._left -= end - at
                if not self._left:
                    self._expects, self.done = "end", not self._chunked
            else:
                end = piece.find(b"\n", at) + 1 or len(piece)
                self._line += piece[at:end]
                if self._line.endswith(b"\n"):
                    self._control(self._line.strip())
                    self._line = b""
            at = end
        self.used = at
        return data

    def _control(self, line: bytes) -> None:
        if self._expects == "end":
            self._expects = "size"
        elif self._expects == "size":
            self._left = int(line.partition(b";")[0], 16)
            self._expects = "data" if self._left else "trailer"
        else:
            self.done = not line


class Peer(asyncio.StreamReaderProtocol):
    """One end of a connection. Unlike a plain stream it tells at once that its peer has gone, whoever is reading."""

    def __init__(self, connected: Callable[..., object] | None = None) -> None:
        self.reader = asyncio.StreamReader()  # the base class may hold it weakly
        super().__init__(self.reader, connected)
        self.gone = False
        self.on_gone: Callable[[], object] = bool

    def eof_received(self) -> bool:
        super().eof_received()
        return False  # closes the transport: nobody here half-closes a connection

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self.gone = True
        self.on_gone()


class Wire:
    """Reads messages off a stream."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._rest = b""

    async def head(self) -> Head | None:
        """The next message's head; None if the peer has closed before it."""
        while (end := self._rest.find(b"\r\n\r\n") + 4) == 3:
            if not (piece := await self._reader.read(_PIECE)):
                if self._rest:
                    raise Broken
                return None
            self._rest += piece
        raw, self._rest = self._rest[:end], self._rest[end:]
        first, *lines = raw.decode("latin-1").rstrip().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Head(raw, first.split(" ", 2), fields)

    async def pieces(self, framing: Framing) -> AsyncIterator[tuple[bytes, list[slice]]]:
        """A body as it comes: bytes, and where in them data lies.

        Raises:
            Broken: it ends too early.
        """
        while not framing.done:
            piece, self._rest = self._rest or await self._reader.read(_PIECE), b""
            if not piece:
                if framing.ends_by_close:
                    return
                raise Broken
            data = framing.feed(piece)
            self._rest = piece[framing.used :]
            yield piece[: framing.used], data


async def raw(pieces: AsyncIterator[tuple[bytes, list[slice]]]) -> AsyncIterator[bytes]:
    """Only the bytes of `Wire.pieces`."""
    async for piece, _ in pieces:
        yield piece


def json_starts(piece: bytes, data: list[slice], events: bool) -> list[int]:
    """Where JSON begins in a piece of a body: anywhere in a stream of events, else with the data."""
    if not events:
        return [data[0].start] if data else []
    marker, found = b"data: {", []
    for part in data:
        at = part.start
        while (at := piece.find(marker, at, part.stop)) >= 0:
            at += len(marker)
            found.append(at - 1)
    return found
