"""One HTTP server as its clients see it: a connection pool, JSON and event streams, and faults told apart.

Three things can go wrong with a request, and each is handled in one place: `Fault` may pass if tried again, `Refused`
will not, `EngineDown` says that the server is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import orjson

from orchestra.errors import EngineDown, EngineError, OrchestraError
from orchestra.runtime.limits import Gate, Limits, backoff, retry_after

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")
_JSON = {"Content-Type": "application/json"}
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
_CONNECT_SECONDS = 10.0
_KEEPALIVE_SECONDS = 4.0  # below uvicorn's 5: a reused connection is rarely one that the server is just closing
_MOST_ERROR_BYTES = 65_536
_SETTLE_SECONDS = 0.5  # for an answer that has said all to end


class Fault(Exception):
    """Something that may go better next time.

    Attributes:
        unreached: the server was not reached at all, so it has done nothing for this request.
        after: seconds that the server asks to wait.
        closed: the server said no before it began: others should wait too.
    """

    def __init__(self, what: str, *, unreached: bool = False, after: float | None = None, closed: bool = False) -> None:
        super().__init__(what)
        self.unreached, self.after, self.closed = unreached, after, closed


class Refused(OrchestraError):
    """The server understood, and said no; asking again would not help.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server and the way to it.

    Args:
        base: URL that all paths come after.
        limits: see `Limits`.
        headers: sent with every request. They may hold a key: nothing here shows them.

    Attributes:
        gate: slots and rate of generations; small questions (tokens, facts, aborts) pass beside it.
    """

    def __init__(self, base: str, limits: Limits, headers: Mapping[str, str] | None = None) -> None:
        self.base = base.rstrip("/")
        self.where = urlsplit(base).netloc
        self.limits = limits
        self.gate = Gate(limits)
        self.headers = dict(headers or {})
        self._session: aiohttp.ClientSession | None = None
        self._lost_at: float | None = None  # since when nothing has been heard of it
        self._insisting = 0  # how many are trying now

    def session(self) -> aiohttp.ClientSession:
        """The pool of connections, made on first use."""
        if self._session is None:
            import aiohttp

            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS),
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=min(_CONNECT_SECONDS, self.limits.timeout),
                    sock_read=self.limits.timeout,
                ),
                headers=self.headers,
                auto_decompress=True,
                read_bufsize=2**18,
            )
        return self._session

    async def close(self) -> None:
        """Close all connections; idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    @property
    def sockets(self) -> int:
        """Connections that are in use now."""
        connector = self._session.connector if self._session else None
        return len(getattr(connector, "_acquired", ()))

    # -- one try -----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def request(self, method: str, path: str, body: bytes | None = None) -> AsyncIterator[aiohttp.ClientResponse]:
        """One request whose answer is good; leaving the block early drops the connection.

        Raises:
            Fault: it may pass.
            Refused: it will not.
        """
        import aiohttp

        try:
            async with self.session().request(
                method, self.base + path, data=body, headers=_JSON if body is not None else None, allow_redirects=False
            ) as response:
                try:
                    if response.status != 200:
                        await self._raise(response)
                    self._lost_at = None
                    yield response
                finally:
                    if not response.content.at_eof():
                        response.close()
        except aiohttp.ClientConnectorError as error:
            self._lose()
            raise Fault(_reason(error), unreached=True) from error
        except (aiohttp.ServerTimeoutError, TimeoutError) as error:
            self._lose()
            if "Connection timeout" in str(error):  # it was not even connected
                raise Fault("connection lost (it does not answer)", unreached=True) from error
            raise Fault(f"silent for {self.limits.timeout:g} seconds") from error
        except (aiohttp.ClientError, OSError) as error:
            self._lose()
            raise Fault(_reason(error)) from error

    def _lose(self) -> None:
        if self._lost_at is None:
            self._lost_at = time.monotonic()

    async def _raise(self, response: aiohttp.ClientResponse) -> None:
        import aiohttp

        status = response.status
        self._lost_at = None
        body = b""
        with contextlib.suppress(aiohttp.ClientPayloadError):  # the status says enough
            while len(body) < _MOST_ERROR_BYTES and (piece := await response.content.readany()):
                body += piece
        message = error_message(body) or response.reason or "no reason given"
        if key := self.headers.get("Authorization", "").removeprefix("Bearer "):
            message = message.replace(key, "***")  # some servers repeat a wrong key
        if status not in _PASSING:
            raise Refused(status, f"{message} (HTTP {status})")
        after = retry_after(response.headers.get("Retry-After"))
        raise Fault(f"HTTP {status}: {message}", after=after, closed=status in (429, 503))

    async def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One small question, tried once; its answer as JSON. See `request` for what it raises."""
        sent = None if body is None else json.dumps(body).encode()
        async with self.request(method, path, sent) as response:
            return decode(await response.read())

    # -- several -----------------------------------------------------------------------------------------------------

    async def insist(self, work: Callable[[], Awaitable[T]], *, gave_up: Callable[[], bool] = lambda: False) -> T:
        """Try until it succeeds, within the limits.

        Args:
            work: one try.
            gave_up: whether the caller has lost interest: then the `Fault` is raised as it is.

        Raises:
            EngineError: the last fault, when it has been tried often enough.
            EngineDown: nothing has been heard of the server for `patience` seconds.
        """
        tries = 0
        if not self._insisting:
            self._lost_at = None  # what was lost when somebody last asked is no news
        self._insisting += 1
        try:
            while True:
                try:
                    return await work()
                except Fault as fault:
                    if gave_up():
                        raise
                    tries += not fault.unreached
                    self._check(fault, tries)
                    wait = backoff(max(tries, 1) if not fault.unreached else 4)
                    if fault.after is not None:
                        wait = max(fault.after, wait / 2)
                    if fault.closed and fault.after:
                        self.gate.pause(fault.after)
                await asyncio.sleep(wait)
                await self.gate.ready()
        finally:
            self._insisting -= 1

    def _check(self, fault: Fault, tries: int) -> None:
        patience, server = self.limits.patience, f"the server at {self.where}"
        if self._lost_at is not None and time.monotonic() - self._lost_at > patience:
            raise EngineDown(f"{server} has not answered for {patience:g} seconds: {fault}") from fault
        if tries > self.limits.retries:
            raise EngineError(f"{server} failed {tries} times, the last time with: {fault}") from fault
        if fault.after is not None and fault.after > max(patience, self.limits.timeout):
            raise EngineError(f"{server} asks to wait {fault.after:g} seconds: {fault}") from fault


def decode(body: bytes) -> Any:
    """JSON from a server.

    Raises:
        Fault: it is damaged.
    """
    try:
        return orjson.loads(body)
    except ValueError:
        pass
    try:
        return json.loads(body.decode())  # some servers write NaN and Infinity, which is Python's JSON only
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is one
        raise Fault(f"it sent what is not JSON: {body[:60]!r}") from error


def error_message(body: bytes) -> str:
    """What an error's body says, in one line of the usual shapes, or the beginning of the body itself."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = body.decode(errors="replace")
    for key in ("error", "detail", "message"):
        if isinstance(found, dict) and key in found:
            found = found[key]
    return " ".join(str(found).split())[:500]


def raise_error(error: Any) -> None:
    """Raise an error that came inside a stream, as what it would have been as a status."""
    code = error.get("code") if isinstance(error, dict) else None
    message = " ".join(str(error.get("message") if isinstance(error, dict) else error).split())
    if isinstance(code, int) and 400 <= code < 500 and code not in _PASSING:
        raise Refused(code, message[:500])
    raise Fault(f"error {code}: {message[:200]}" if code is not None else f"error: {message[:200]}")


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[list[bytes]]:
    """The data of server-sent events, in the batches in which they arrive; ends after `[DONE]`.

    Raises:
        Fault: the stream ended without `[DONE]`.
    """
    rest = b""
    while True:
        piece = await response.content.readany()
        if not piece:
            raise Fault("its stream broke off")
        data = (rest + piece) if rest else piece
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        blocks = data.split(b"\n\n")
        rest = blocks.pop()
        batch = [data for block in blocks if (data := _data(block))]
        done = b"[DONE]" in batch
        if done:
            del batch[batch.index(b"[DONE]") :]
        if batch:
            yield batch
        if done:
            await settle(response)
            return


async def settle(response: aiohttp.ClientResponse) -> None:
    """Let an answer that has said all come to its end, so that its connection can be used again."""
    import aiohttp

    with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
        async with asyncio.timeout(_SETTLE_SECONDS):
            while await response.content.readany():
                pass


def _data(block: bytes) -> bytes:
    """The data of one event; its other fields, and comments, say nothing to us."""
    if block.startswith(b"data:") and b"\n" not in block:
        return block[5:].strip()
    return b"\n".join(line[5:].strip() for line in block.split(b"\n") if line.startswith(b"data:"))


def _reason(error: BaseException) -> str:
    """One line about a lost connection, without addresses and object names."""
    cause = error.__cause__ or getattr(error, "os_error", None) or error
    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return f"connection lost ({' '.join(str(text).split())})"
