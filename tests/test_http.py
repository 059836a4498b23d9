"""One server as its clients see it: what is tried again and what is not, for how long, and what is left behind."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable

import pytest
from fakes import Fake, free_port, half, in_turn, reset, says, serving, silent, sse, stream

from orchestra.errors import EngineDown, EngineError
from orchestra.runtime import limits as limits_module
from orchestra.runtime.http import Fault, Refused, Server, error_message, events
from orchestra.runtime.limits import Limits

GOOD = {"ok": True}
QUICK = {"timeout": 0.3, "retries": 3, "patience": 5.0}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come after milliseconds."""
    monkeypatch.setattr(limits_module, "_FIRST_DELAY", 0.004)


def asked(handler, *, headers=None, **options) -> tuple[object, Fake, Server]:
    """The answer to one question that is insisted on, or its error."""

    async def main():
        async with serving(handler) as fake:
            server = Server(fake.base, Limits(**{**QUICK, **options}), headers)
            try:
                answer = await server.insist(lambda: server.ask("POST", "/x", {"a": 1}))
            except (Fault, Refused, EngineError) as error:
                answer = error
            assert server.sockets == 0
            await server.close()
            await asyncio.wait_for(fake.idle(), 5)
            return answer, fake, server

    return asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize(
    "bad",
    [
        *(says({"error": "busy"}, status) for status in (408, 425, 429, 500, 502, 503, 504, 529)),
        reset,
        silent,
        says(b'{"ok": tr'),
        says(b""),
        says(b'"\xff\xfe"'),
        says(b"[" * 100_000),
        half(b'{"ok": true, "more": "than this"}'),
        stream([b'{"ok":', b" t"], broken=True),
    ],
)
def test_what_may_pass_is_tried_again(bad: Callable) -> None:
    answer, fake, _ = asked(in_turn(bad, bad, says(GOOD)))
    assert answer == GOOD
    assert fake.requests == [("POST", "/x", {"a": 1})] * 3


@pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 405, 413, 422, 501])
def test_what_will_not_pass_is_asked_once(status: int) -> None:
    answer, fake, _ = asked(in_turn(says({"error": {"message": "no\n such\tthing"}}, status), says(GOOD)))
    assert isinstance(answer, Refused)
    assert answer.status == status
    assert str(answer) == f"no such thing (HTTP {status})"
    assert len(fake.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_asks_to_wait_is_left_alone_by_everyone(status: int) -> None:
    async def main() -> None:
        times: list[float] = []
        answers = in_turn(says({}, status, Retry_After="0.6"), says(GOOD))

        async def handler(request):
            times.append(time.monotonic())
            return await answers(request)

        async with serving(handler) as fake:
            server = Server(fake.base, Limits(**QUICK))
            first = asyncio.create_task(server.insist(lambda: server.ask("POST", "/x")))
            await asyncio.sleep(0.2)
            async with server.gate:  # another request, which has not begun
                await server.gate.ready()
                await server.ask("POST", "/y")
            assert await first == GOOD
            await server.close()
        assert len(times) == 3
        assert min(times[1:]) >= times[0] + 0.6

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_wait_of_hours_is_an_error_at_once() -> None:
    answer, fake, _ = asked(says({"detail": "quota spent"}, 429, Retry_After="7200"))
    assert type(answer) is EngineError
    assert "asks to wait 7200 seconds: HTTP 429: quota spent" in str(answer)
    assert len(fake.requests) == 1


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("retries", [0, 1, 4])
def test_retries_end_with_the_last_fault(retries: int) -> None:
    answer, fake, server = asked(
        in_turn(*[says({}, 500)] * retries, says({"message": "out of memory"}, 503)), retries=retries
    )
    assert type(answer) is EngineError
    assert str(answer) == (
        f"the server at {server.where} failed {retries + 1} times, the last time with: HTTP 503: out of memory"
    )
    assert len(fake.requests) == retries + 1


def test_a_slow_and_steady_answer_is_not_silent() -> None:
    pieces = [b'{"ok": ', *[b" "] * 12, b"true}"]
    began = time.monotonic()
    answer, fake, _ = asked(stream(pieces, pause=0.08), timeout=0.4)
    assert answer == GOOD
    assert len(fake.requests) == 1
    assert time.monotonic() - began > 2 * 0.4


def test_a_caller_who_gave_up_gets_the_fault() -> None:
    async def main() -> None:
        async with serving(says({}, 500)) as fake:
            server = Server(fake.base, Limits(**QUICK))
            with pytest.raises(Fault, match="HTTP 500"):
                await server.insist(lambda: server.ask("GET", "/"), gave_up=lambda: True)
            await server.close()
            assert len(fake.requests) == 1

    asyncio.run(main())


# -- out of reach ------------------------------------------------------------------------------------------------------


def test_a_dead_server_is_given_up_after_patience() -> None:
    async def main() -> None:
        port = free_port()
        server = Server(f"http://127.0.0.1:{port}", Limits(patience=0.5, retries=0))
        began = time.monotonic()
        with pytest.raises(EngineDown) as error:
            await server.insist(lambda: server.ask("GET", "/"))
        assert 0.5 <= time.monotonic() - began < 0.5 + 6
        text = str(error.value)
        assert text.startswith(f"the server at 127.0.0.1:{port} has not answered for 0.5 seconds: connection lost (")
        assert "\n" not in text
        assert "object at" not in text
        await server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_server_that_comes_back_in_time_is_waited_for() -> None:
    async def main() -> None:
        async with serving(says(GOOD)) as fake:
            server = Server(fake.base, Limits(patience=20, retries=0))
            assert await server.insist(lambda: server.ask("GET", "/")) == GOOD
            await fake.stop()
            waiting = [asyncio.create_task(server.insist(lambda: server.ask("GET", "/"))) for _ in range(5)]
            await asyncio.sleep(0.3)
            assert not any(task.done() for task in waiting)
            await fake.start()
            assert await asyncio.gather(*waiting) == [GOOD] * 5
            await server.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.usefixtures("soon")
def test_time_in_which_nobody_asked_is_not_silence() -> None:
    async def main() -> None:
        async with serving(in_turn(reset, reset, says(GOOD))) as fake:
            server = Server(fake.base, Limits(**{**QUICK, "patience": 0.2}))
            with pytest.raises(Fault):
                await server.insist(lambda: server.ask("POST", "/"), gave_up=lambda: True)
            await asyncio.sleep(0.3)
            assert await server.insist(lambda: server.ask("POST", "/")) == GOOD
            await server.close()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_host_that_does_not_answer_is_not_reached() -> None:
    async def main() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            where = listener.getsockname()
            fillers = [socket.socket() for _ in range(8)]  # a full queue: the kernel drops what comes after
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(where)
            server = Server(f"http://127.0.0.1:{where[1]}", Limits(timeout=0.3))
            with pytest.raises(Fault) as fault:
                await server.ask("GET", "/")
            assert fault.value.unreached
            assert str(fault.value) == "connection lost (it does not answer)"
            await server.close()
            for filler in fillers:
                filler.close()

    asyncio.run(asyncio.wait_for(main(), 20))


# -- what errors say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too  long\\n by 3", "type": "x", "code": 400}}', "too long by 3"),
        (b'{"error": "no such model"}', "no such model"),
        (b'{"object": "error", "message": "bad temperature", "code": 400}', "bad temperature"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": {"error": "nested", "message": "inner"}}', "inner"),
        (b'{"detail": [{"loc": ["body"], "msg": "Field required"}]}', "[{'loc': ['body'], 'msg': 'Field required'}]"),
        (b"<html>\n<h1>Bad   Gateway</h1>\n</html>", "<html> <h1>Bad Gateway</h1> </html>"),
        (b"plain\r\n words \xff", "plain words \ufffd"),
        (b"", ""),
        (b"x" * 900, "x" * 500),
        (b"[" * 100_000, "[" * 500),
    ],
)
def test_an_error_is_one_line_of_whatever_the_server_says(body: bytes, message: str) -> None:
    assert error_message(body) == message


def test_an_error_is_read_to_its_end_however_it_comes() -> None:
    pieces = [b'{"error": {"mess', b'age": "the model is ', b'not there"}}']
    answer, _, _ = asked(stream(pieces, pause=0.03, status=404))
    assert str(answer) == "the model is not there (HTTP 404)"
    answer, fake, _ = asked(stream([b"not he"], status=404, broken=True))
    assert isinstance(answer, Refused), "what is refused stays refused, even if the reason is lost"
    assert len(fake.requests) == 1
    answer, _, _ = asked(says(b"", 404))
    assert str(answer) == "Not Found (HTTP 404)"


def test_no_error_repeats_the_key() -> None:
    key = {"Authorization": "Bearer sk-very-secret"}
    answer, fake, server = asked(says({"error": "wrong key: sk-very-secret"}, 401), headers=key)
    assert fake.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert str(answer) == "wrong key: *** (HTTP 401)"
    assert "secret" not in repr(server)


# -- what is left ------------------------------------------------------------------------------------------------------


def test_no_connection_is_left_in_use() -> None:
    async def main() -> None:
        endless = stream([b"data: {}\n\n"] * 10_000, pause=0.01)
        async with serving(endless) as fake:
            server = Server(fake.base, Limits(**QUICK))

            async def read(stop_after: int | None) -> None:
                async with server.request("POST", "/s", b"{}") as response:
                    async for _ in events(response):
                        if stop_after is not None:
                            return
                        await asyncio.sleep(0)

            await asyncio.gather(*(read(1) for _ in range(5)))  # left early
            tasks = [asyncio.create_task(read(None)) for _ in range(5)]
            await asyncio.sleep(0.1)
            assert server.sockets == 5
            assert fake.running >= 5
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            assert server.sockets == 0
            await asyncio.wait_for(fake.idle(), 5)
            with pytest.raises(RuntimeError, match="of the caller"):
                async with server.request("POST", "/s", b"{}"):
                    raise RuntimeError("of the caller")
            assert server.sockets == 0
            await server.close()
            await server.close()
            await asyncio.wait_for(fake.idle(), 5)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_stream_that_ends_well_leaves_its_connection_for_the_next() -> None:
    async def main() -> None:
        async with serving(stream(sse({"a": 1}), pause=0.01)) as fake:
            server = Server(fake.base, Limits(**QUICK))
            for _ in range(5):
                async with server.request("POST", "/s", b"{}") as response:
                    assert [batch async for batch in events(response)] == [[b'{"a": 1}']]
            assert fake.made == 1
            await server.close()

    asyncio.run(asyncio.wait_for(main(), 20))
