"""OpenAI's answers and streams: whatever the chunks, the deltas add up to the generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestra.answers import split_reasoning
from orchestra.errors import OrchestraError
from orchestra.graph import ThreadGraph
from orchestra.runtime.engine import Delta, Request, Sampling, Stream
from orchestra.runtime.http import Fault, Refused
from orchestra.runtime.openai_wire import Reading
from orchestra.runtime.remote import Sample


def samples(count: int = 1, **sampling: Any) -> list[Sample]:
    graph = ThreadGraph()
    made = [Sample(Request(graph, graph.add(), Sampling(**sampling), chunk=1)) for _ in range(count)]
    for sample in made:
        sample.stream = Stream(lambda: None)
    return made


def feed(reading: Reading, *found: Any) -> None:
    for event in found:
        for sample, delta in reading.read(event):
            sample.give(delta)


def end(reading: Reading) -> None:
    for sample, delta in reading.ends():
        sample.give(delta)


def got(sample: Sample) -> Delta:
    return sample.stream.taken()[0]


def read(*found: Any, **sampling: Any) -> Delta:
    """What events of one sample add up to."""
    [sample] = samples(**sampling)
    reading = Reading([sample])
    feed(reading, *found)
    end(reading)
    assert sample.ended
    return got(sample)


def choice(index: int = 0, *, chat: bool, whole: bool, text: str, reason: str | None, **more: Any) -> dict[str, Any]:
    said = {("message" if whole else "delta"): {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"index": index, **said, "finish_reason": reason, **more}


TOKEN = st.tuples(st.integers(3, 99), st.sampled_from(["", "a", "思", " b"]))
USAGE = {"prompt_tokens": 9, "completion_tokens": 21, "prompt_tokens_details": {"cached_tokens": 4}}


# -- counts ------------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    pieces=st.lists(st.lists(TOKEN, max_size=4), max_size=6),
    chat=st.booleans(),
    reason=st.sampled_from(["stop", "length"]),
    late=st.booleans(),
)
def test_token_ids_count_themselves(pieces: Any, chat: bool, reason: str, late: bool) -> None:
    """`late`: the end comes in an event of its own."""
    ids = [[i for i, _ in piece] for piece in pieces]
    texts = ["".join(text for _, text in piece) for piece in pieces]
    flat, text = [i for piece in ids for i in piece], "".join(texts)
    assume(flat)  # a generation without a token is no server's
    expected = Delta(flat, len(flat), text, finish_reason=reason, cached_tokens=4, eos=reason == "stop")
    parts = [
        {"choices": [choice(chat=chat, whole=False, text=t, reason=None, token_ids=i)]}
        for i, t in zip(ids, texts, strict=True)
    ]
    if late or not parts:
        parts.append({"choices": [choice(chat=chat, whole=False, text="", reason=reason, token_ids=[])]})
    else:
        parts[-1]["choices"][0]["finish_reason"] = reason
    assert read(*parts, {"choices": [], "usage": USAGE}) == expected
    whole = {"choices": [choice(chat=chat, whole=True, text=text, reason=reason, token_ids=flat)], "usage": USAGE}
    assert read(whole) == expected


@settings(max_examples=200)
@given(
    pieces=st.lists(st.sampled_from(["", "a", "思", " some words"]), max_size=6),
    chat=st.booleans(),
    usage=st.sampled_from(["end", "each", "none"]),
    total=st.integers(0, 30),
)
def test_without_token_ids_the_usage_counts(pieces: list[str], chat: bool, usage: str, total: int) -> None:
    """A chunk counts as one token until the server says better; a text is never less than its last chunk."""
    parts: list[Any] = [{"choices": [choice(chat=chat, whole=False, text=piece, reason=None)]} for piece in pieces]
    parts.append({"choices": [choice(chat=chat, whole=False, text="", reason="stop")]})
    if usage == "each":
        for k, part in enumerate(parts):
            part["usage"] = {"completion_tokens": min(k, total)}
    if usage != "none":
        parts.append({"choices": [], "usage": {"completion_tokens": total}})
    chunks = sum(map(bool, pieces))
    delta = read(*parts)
    assert (delta.text, delta.tokens, delta.finish_reason) == ("".join(pieces), [], "stop")
    assert delta.count == (chunks if usage == "none" else max(chunks, total))
    assert not delta.eos, "a token that nobody counted is not to be cut off"
    text = "".join(pieces)
    answer: Any = {"choices": [choice(chat=chat, whole=True, text=text, reason="stop")]}
    assert read(answer).count == bool(text)
    assert read(answer | {"usage": {"completion_tokens": total}}).count == max(bool(text), total)


@given(st.permutations([0, 0, 0, 1, 1, 2, 2, 2]), st.booleans())
def test_several_samples_keep_apart(order: list[int], whole: bool) -> None:
    found = samples(3)
    reading = Reading(found)
    left = {index: order.count(index) for index in range(3)}
    if whole:
        texts = [f"s{index}" for index in range(3)]
        choices = [
            choice(i, chat=False, whole=True, text=texts[i], reason="stop", token_ids=[10 + i, 2]) for i in set(order)
        ]
        feed(reading, {"choices": choices, "usage": USAGE})
    else:
        for index in order:
            left[index] -= 1
            reason = None if left[index] else "length"
            part = choice(
                index, chat=True, whole=False, text=f"{left[index]}", reason=reason, token_ids=[left[index] + 10]
            )
            feed(reading, {"choices": [part]})
        feed(reading, {"choices": [], "usage": USAGE})
    end(reading)
    for index, sample in enumerate(found):
        delta = got(sample)
        n = order.count(index)
        if whole:
            assert (delta.tokens, delta.text, delta.eos) == ([10 + index, 2], f"s{index}", True)
        else:
            assert delta.tokens == [k + 10 for k in reversed(range(n))]
            assert delta.text == "".join(str(k) for k in reversed(range(n)))
            assert delta.finish_reason == "length"
        assert delta.cached_tokens == (4 if index == 0 else 0), "they share one prompt"


def test_a_try_that_goes_on_counts_what_is_new() -> None:
    [sample] = samples()
    sample.give(Delta([], 3, "abc"))
    reading = Reading([sample])
    feed(reading, {"choices": [choice(chat=False, whole=False, text="d", reason=None)]})
    feed(reading, {"choices": [choice(chat=False, whole=False, text="", reason="stop")], "usage": USAGE})
    end(reading)
    delta = got(sample)
    assert (delta.text, delta.count, delta.cached_tokens) == ("abcd", 3 + 21, 0)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "told", "finish", "matched", "eos"),
    [
        ("stop", {"matched_stop": 2}, "stop", None, True),
        ("stop", {"matched_stop": None}, "stop", None, True),
        ("stop", {"matched_stop": "END"}, "stop", "END", False),
        ("stop", {"matched_stop": 9}, "stop", 9, False),
        ("stop", {"stop_reason": None}, "stop", None, True),
        ("stop", {"stop_reason": "END"}, "stop", "END", False),
        ("stop", {"stop_reason": 9}, "stop", 9, False),
        ("stop", {}, "stop", None, True),
        ("length", {"matched_stop": None}, "length", None, False),
        ("content_filter", {}, "stop", None, True),
        ("tool_calls", {}, "stop", None, True),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_reasons(reason: str, told: dict, finish: str, matched: Any, eos: bool, whole: bool) -> None:
    event = {"choices": [choice(chat=False, whole=whole, text="xEND", reason=reason, token_ids=[11, 9], **told)]}
    delta = read(event, stop=("END",), stop_ids=(9,))
    assert (delta.finish_reason, delta.matched, delta.eos) == (finish, matched, eos)


def test_an_abort_is_our_end_or_the_servers_fault() -> None:
    event = {"choices": [choice(chat=False, whole=False, text="x", reason="abort", token_ids=[11])]}
    [sample] = samples()
    with pytest.raises(Fault, match="aborted by the server"):
        feed(Reading([sample]), event)
    assert got(sample).tokens == [11]
    [sample] = samples()
    sample.cancelled = True
    feed(Reading([sample]), event)
    assert (delta := got(sample)).tokens == [11]
    assert delta.finish_reason == "cancelled"


@pytest.mark.parametrize(("code", "kind"), [(400, Refused), (500, Fault), (None, Fault), ("quota", Fault)])
def test_errors_inside_a_stream(code: Any, kind: type) -> None:
    [sample] = samples()
    reading = Reading([sample])
    feed(reading, {"choices": [choice(chat=True, whole=False, text="x", reason=None)]})
    with pytest.raises((Fault, OrchestraError)) as raised:
        feed(reading, {"error": {"message": "m", "code": code}})
    assert type(raised.value) is kind
    assert got(sample).text == "x"


# -- reasoning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_the_reasoning_channel_becomes_tags(key: str) -> None:
    said: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {key: "so "},
        {key: "thinking", "content": None},
        {"content": "It "},
        {"content": "is 4.", key: None},
    ]
    parts = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in said]
    streamed = read(*parts, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    message = {"role": "assistant", "content": "It is 4.", key: "so thinking"}
    whole = read({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
    assert streamed.text == whole.text == "<think>\nso thinking\n</think>\n\nIt is 4."
    assert split_reasoning(whole.text).thinking.strip() == "so thinking"
    assert split_reasoning(whole.text).solution.strip() == "It is 4."


# -- damage ------------------------------------------------------------------------------------------------------------

WRONG: list[Any] = [None, -1, 1, 5, 1.5, math.inf, "x", [], ["x"], [1], {}, {"x": 1}, True]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("path", [(), ("choices",), ("usage",), ("choices", 0), *(("choices", 0, key) for key in (
    "index", "text", "delta", "finish_reason", "token_ids", "logprobs"))])  # fmt: skip
def test_another_shape_is_a_fault_and_nothing_else(path: tuple[Any, ...], chat: bool) -> None:
    for value in WRONG:
        part = choice(chat=chat, whole=False, text="ab", reason="stop", token_ids=[11, 12])
        part["logprobs"] = {"token_logprobs": [-1.0, -2.0]}
        event: Any = {"choices": [part], "usage": USAGE}
        if path:
            parent = event
            for step in path[:-1]:
                parent = parent[step]
            parent[path[-1]] = value
        else:
            event = value
        [sample] = samples(logprobs=True)
        reading = Reading([sample])
        try:
            feed(reading, event)
            end(reading)
        except Fault:
            continue
        delta = got(sample)
        assert isinstance(delta.text, str), (path, value)
        assert type(delta.count) is int
        assert type(delta.cached_tokens) is int
        assert delta.finish_reason in (None, "stop"), (path, value)
        assert len(delta.logprobs) in (0, delta.count)
        assert delta.matched is None
