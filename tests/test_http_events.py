"""Server-sent events come out the same however the bytes were cut."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra.errors import OrchestraError
from orchestra.runtime.http import Fault, Refused, decode, events, raise_error

DONE = b"data: [DONE]\n\n"


def response_of(pieces: list[bytes]) -> Any:
    """A response whose body arrives in these pieces."""
    left = [piece for piece in pieces if piece]

    async def readany() -> bytes:
        return left.pop(0) if left else b""

    return SimpleNamespace(content=SimpleNamespace(readany=readany))


def read(pieces: list[bytes]) -> list[Any]:
    """All events, decoded."""

    async def main() -> list[Any]:
        return [decode(event) async for batch in events(response_of(pieces)) for event in batch]

    return asyncio.run(main())


TEXTS = ["plain", "zwölf €", "思考", "👩‍🚀 emoji", "line\nbreak\r\n", '"data: [DONE]"', "\u2028 \x00"]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_every_cut_in_two_gives_the_same_events(newline: bytes, ascii_only: bool) -> None:
    found = [{"text": text} for text in TEXTS]
    frames = [b"data: " + json.dumps(event, ensure_ascii=ascii_only).encode() for event in found]
    body = b"".join(frame + 2 * newline for frame in [*frames, b"data: [DONE]"])
    for cut in range(len(body) + 1):
        assert read([body[:cut], body[cut:]]) == found, cut


NOISE = st.sampled_from([b"", b": ping\n\n", b"event: ping\n\n", b"retry: 10\n\n", b"\n", b":\n\n", b"id: 4\n: x\n\n"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[Any], list[bytes]]:
    """Events, and a stream that says them: other fields and comments between, cut anywhere."""
    found = draw(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=6), max_size=2), max_size=5))
    body = b""
    for event in found:
        raw = json.dumps(event, ensure_ascii=draw(st.booleans())).encode()
        before = draw(st.sampled_from([b"", b"event: message\n", b": note\n", b"id: 7\n"]))
        after = draw(st.sampled_from([b"", b"\nid: 8", b"\n: note"]))
        body += draw(NOISE) + before + draw(st.sampled_from([b"data: ", b"data:"])) + raw + after + b"\n\n"
    body += draw(NOISE) + DONE + draw(st.sampled_from([b"", b": bye\n\n", b"data: after the end\n\n"]))
    if draw(st.booleans()):
        body = body.replace(b"\n", b"\r\n")
    cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=12)))
    return found, [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]


@given(streams())
def test_any_cuts_with_other_fields_and_comments_give_the_same_events(case: tuple[list[Any], list[bytes]]) -> None:
    found, pieces = case
    assert read(pieces) == found


def test_an_event_in_several_lines_is_one() -> None:
    assert read([b'data: {"a":\ndata:  [1,\r\ndata: 2]}\n\n', DONE]) == [{"a": [1, 2]}]


def test_events_arrive_as_they_come() -> None:
    """What has arrived is handed over before the next piece is asked for, in one batch."""

    async def main() -> None:
        batches = events(response_of([b"data: 1\n\ndata: 2\n\nda", b"ta: 3\n", b"\n", DONE]))
        assert [batch async for batch in batches] == [[b"1", b"2"], [b"3"]]

    asyncio.run(main())


@pytest.mark.parametrize("pieces", [[], [b'data: {"a": 1}\n\n'], [b"data: {}\n\n", b"data: [DONE]\n"], [b": ping\n\n"]])
def test_a_stream_without_its_end_has_broken_off(pieces: list[bytes]) -> None:
    with pytest.raises(Fault, match="broke off"):
        read(pieces)


def test_what_came_before_a_break_is_handed_over() -> None:
    async def main() -> list[bytes]:
        got: list[bytes] = []
        stream = events(response_of([b"data: 1\n\n", b"data: 2\n\ndata: 3"]))
        got += await anext(stream)
        got += await anext(stream)
        with pytest.raises(Fault):
            await anext(stream)
        return got

    assert asyncio.run(main()) == [b"1", b"2"]


@pytest.mark.parametrize("raw", [b'"\xff"', b'"\xc3', b'{"a": #}', b"", b"[" * 100_000, b"1" * 5000, b'"\xed\xa0\x80"'])
def test_damaged_json_is_a_fault(raw: bytes) -> None:
    with pytest.raises(Fault, match="it sent what is not JSON") as fault:
        decode(raw)
    assert len(str(fault.value)) < 300
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        ({"code": 400, "message": "too\n long"}, Refused, "too long"),
        ({"code": 404, "message": "m" * 900}, Refused, "m" * 500),
        ({"code": 408, "message": "x"}, Fault, "error 408: x"),
        ({"code": 429, "message": "x"}, Fault, "error 429: x"),
        ({"code": 500, "message": "a\nb"}, Fault, "error 500: a b"),
        ({"code": "overloaded", "message": "x"}, Fault, "error overloaded: x"),
        ({"message": "x"}, Fault, "error: x"),
        ("some\ntext", Fault, "error: some text"),
        (None, Fault, "error: None"),
    ],
)
def test_an_error_inside_a_stream_is_what_its_status_would_have_been(error: Any, kind: type, message: str) -> None:
    with pytest.raises((Fault, OrchestraError)) as raised:
        raise_error(error)
    assert type(raised.value) is kind
    assert str(raised.value) == message
