"""SGLang's streams: whatever the chunks and whoever looks, the deltas add up to the generation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra.errors import OrchestraError
from orchestra.graph import ThreadGraph
from orchestra.runtime.engine import Delta, Request, Sampling, Stream
from orchestra.runtime.http import Fault, Refused
from orchestra.runtime.remote import Sample
from orchestra.runtime.sglang_wire import Reading, alternatives
from orchestra.runtime.sglang_wire import settings as wire_settings

EOS, STOP_ID = 2, 9
REASONS = {
    "eos": {"type": "stop", "matched": EOS},
    "id": {"type": "stop", "matched": STOP_ID},
    "string": {"type": "stop", "matched": "END"},
    "length": {"type": "length", "length": 3},
    "abort": {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None},
}


@dataclass
class Said:
    """A generation: its tokens, and how it ended."""

    ids: list[int]
    pieces: list[str]
    end: str = "eos"
    cached: int = 5
    logprobs: list[float] = field(default_factory=list)

    def event(self, before: int, k: int, *, incremental: bool, index: int | None, asked: bool = True) -> bytes:
        """What the server says after `k` tokens, when it has said `before`, with SGLang's keys."""
        since = before if incremental else 0
        last = k == len(self.ids)
        meta: dict[str, Any] = {"id": "r", "finish_reason": REASONS[self.end] if last else None, "prompt_tokens": 7}
        if asked:
            pairs = list(zip(self.logprobs, self.ids, strict=True))[since:k]
            meta |= {"input_token_logprobs": [], "output_token_logprobs": [[lp, i, None] for lp, i in pairs]}
            meta |= {"output_top_logprobs": [[[lp, i, None], [lp - 1, i + 1, None]] for lp, i in pairs]}
        meta |= {"completion_tokens": k, "cached_tokens": self.cached, "dp_rank": None}
        event = {"text": "".join(self.pieces[since:k]), "output_ids": self.ids[since:k], "meta_info": meta}
        if index is not None:
            event["index"] = index
        return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()

    def whole(self, k: int | None = None) -> Delta:
        """All of it, or its first `k` tokens, as one delta."""
        n = len(self.ids) if k is None else k
        delta = Delta(self.ids[:n], n, "".join(self.pieces[:n]), self.logprobs[:n], cached_tokens=self.cached * bool(n))
        delta.top = [{i: lp, i + 1: lp - 1} for lp, i in zip(delta.logprobs, delta.tokens, strict=True)]
        delta.tempered = list(delta.logprobs)
        if k is None:
            delta.finish_reason = {"length": "length", "abort": None}.get(self.end, "stop")
            delta.matched = {"string": "END", "id": STOP_ID}.get(self.end)
            delta.eos = self.end == "eos"
        return delta


PIECES = st.sampled_from(["", "a", " the", "é", "思", "👩‍🚀", '"finish_reason":null', '"index":0}', "\n", "}"])


@st.composite
def generations(draw: st.DrawFn, ends: tuple[str, ...] = ("eos", "id", "string", "length")) -> Said:
    pieces = draw(st.lists(PIECES, min_size=1, max_size=12))
    ids = draw(st.lists(st.integers(10, 99), min_size=len(pieces), max_size=len(pieces)))
    logprobs = [-float(k + 1) for k in range(len(ids))]
    return Said(ids, pieces, draw(st.sampled_from(ends)), draw(st.integers(0, 9)), logprobs)


def samples(count: int = 1, *, chunk: int = 1, **sampling: Any) -> list[Sample]:
    graph = ThreadGraph()
    asked = {"temperature": 1.0, "stop_ids": (STOP_ID,), "logprobs": True, "top_logprobs": 2, **sampling}
    made = []
    for _ in range(count):
        made.append(Sample(Request(graph, graph.add(), Sampling(**asked), chunk=chunk)))
        made[-1].stream = Stream(lambda: None, chunk)
    return made


def feed(reading: Reading, batches: list[list[bytes]]) -> None:
    for batch in batches:
        for sample, delta in reading.read(batch):
            sample.give(delta)


def got(sample: Sample) -> Delta:
    return sample.stream.taken()[0]


@settings(max_examples=300)
@given(st.data(), st.booleans(), st.sampled_from([0, 1, 3]), st.booleans())
def test_any_chunks_add_up_to_the_whole(data: st.DataObject, incremental: bool, chunk: int, asked: bool) -> None:
    said = data.draw(st.lists(generations(), min_size=1, max_size=4))
    several = len(said) > 1
    queues = []
    for index, one in enumerate(said):
        n = len(one.ids)
        cuts = [*sorted(data.draw(st.lists(st.integers(0, n - 1), max_size=5))), n]
        where = index if several else data.draw(st.sampled_from([None, 0]))
        befores = [0, *cuts[:-1]]
        queues.append(
            [
                one.event(a, b, incremental=incremental, index=where, asked=asked)
                for a, b in zip(befores, cuts, strict=True)
            ]
        )
    order = data.draw(st.permutations([i for i, queue in enumerate(queues) for _ in queue]))
    mixed = [queues[index].pop(0) for index in order]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mixed)), max_size=6)))
    batches = [mixed[a:b] for a, b in zip([0, *cuts], [*cuts, len(mixed)], strict=True)]
    found = samples(len(said), chunk=chunk, **({} if asked else {"logprobs": False, "top_logprobs": 0}))
    feed(Reading(found, incremental), batches)
    for sample, one in zip(found, said, strict=True):
        expected = one.whole()
        if not asked:
            expected.logprobs, expected.top, expected.tempered = [], [], []
        assert got(sample) == expected
        assert sample.ended


@given(generations(), st.booleans(), st.integers(0, 12))
def test_the_rest_is_what_nobody_has_looked_at(said: Said, incremental: bool, seen: int) -> None:
    """A quiet cumulative stream is read at its end only; broken before it, what came is still there, once."""
    seen = min(seen, len(said.ids) - 1)
    [sample] = samples(chunk=0)
    reading = Reading([sample], incremental)
    if seen:
        feed(reading, [[said.event(0, 1, incremental=incremental, index=None)]])
        feed(reading, [[said.event(1, seen, incremental=incremental, index=None)]] if seen > 1 else [])
    rest = reading.rest(sample)
    assert (rest is not None) == (seen > 0 and not incremental)
    if rest is not None:
        sample.give(rest)
    assert reading.rest(sample) is None
    assert got(sample) == said.whole(seen)


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("chunk", [0, 1])
def test_an_abort_that_we_asked_for_is_an_end(incremental: bool, chunk: int) -> None:
    said = Said([11, 12, 13], ["a", "b", "c"], "abort", 5, [-1.0, -2.0, -3.0])
    [sample] = samples(chunk=chunk)
    reading = Reading([sample], incremental)
    feed(reading, [[said.event(0, 1, incremental=incremental, index=None)]])
    sample.cancelled = True
    feed(reading, [[said.event(1, 3, incremental=incremental, index=None)]])
    expected = said.whole()
    expected.finish_reason = "cancelled"
    assert got(sample) == expected


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize(("status", "kind"), [(None, Fault), (500, Fault), (503, Fault), (400, Refused)])
def test_an_abort_of_the_servers_own_is_an_error_after_what_came(
    status: int | None, kind: type, incremental: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REASONS["abort"], "status_code", status)
    said = Said([11, 12, 13], ["a", "b", "c"], "abort", 5, [-1.0, -2.0, -3.0])
    [sample] = samples()
    with pytest.raises((Fault, OrchestraError), match="aborted: Aborted") as error:
        feed(Reading([sample], incremental), [[said.event(0, 3, incremental=incremental, index=None)]])
    assert type(error.value) is kind
    assert got(sample) == said.whole()
    assert not sample.ended


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ({"error": {"message": "m", "code": 400}}, Refused),
        ({"error": {"message": "m", "code": 500}}, Fault),
        ({"error": "m"}, Fault),
        ({"object": "x", "error": {"message": "m", "code": 422}}, Refused),
        ({"index": 0}, Fault),
        ([], Fault),
    ],
)
def test_an_error_inside_a_stream_comes_after_what_came_before_it(
    bad: Any, kind: type, count: int, chunk: int, incremental: bool
) -> None:
    said = Said([11, 12, 13], ["a", "b", "c"], "eos", 5, [-1.0, -2.0, -3.0])
    found = samples(count, chunk=chunk)
    reading = Reading(found, incremental)
    first = said.event(0, 2, incremental=incremental, index=0 if count > 1 else None)
    error = json.dumps(bad, separators=(",", ":")).encode()
    with pytest.raises((Fault, OrchestraError)) as raised:
        feed(reading, [[first, error]])
    assert type(raised.value) is kind
    if (rest := reading.rest(found[0])) is not None:
        found[0].give(rest)
    if "error" in str(bad)[:8] or incremental or chunk == 0:
        assert got(found[0]) == said.whole(2)
    assert not found[0].ended


GOOD = json.loads(Said([11, 12], ["a", "b"], "eos", 5, [-1.0, -2.0]).event(0, 2, incremental=False, index=0))
META = ("finish_reason", "completion_tokens", "cached_tokens", "output_token_logprobs", "output_top_logprobs")
PATHS = [("text",), ("output_ids",), ("index",), ("meta_info",), *(("meta_info", key) for key in META)]
HARMLESS = [("index",), ("meta_info", "finish_reason"), ("meta_info", "cached_tokens")]  # some other values are right
WRONG: list[Any] = [None, True, -1, 1.5, math.inf, "x", "", [], ["x"], [1], [11, "12"], [11, True], {}, {"type": "odd"}]


@pytest.mark.parametrize("incremental", [False, True])
@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("path", PATHS)
def test_another_shape_is_a_fault_and_nothing_else(path: tuple[str, ...], chunk: int, incremental: bool) -> None:
    for value in [KeyError, *WRONG]:
        event = json.loads(json.dumps(GOOD))
        parent = event[path[0]] if len(path) > 1 else event
        if value is KeyError:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value
        found = samples(2, chunk=chunk)
        reading = Reading(found, incremental)
        fault = None
        try:
            feed(reading, [[json.dumps(event, separators=(",", ":")).encode()]])
            if (rest := reading.rest(found[0])) is not None:
                found[0].give(rest)
        except Fault as error:
            fault = str(error)
        if fault is not None:
            assert "\n" not in fault
            assert len(fault) < 300
            continue
        assert path in HARMLESS or (path == ("text",) and value in ("", "x")), (path, value)
        for sample in found:
            delta = got(sample)
            assert delta.count == len(delta.tokens) == len(delta.logprobs) == len(delta.top)


@pytest.mark.parametrize("index", [2, 7, -1])
def test_a_sample_that_nobody_asked_for_is_a_fault(index: int) -> None:
    event = dict(GOOD, index=index)
    for incremental in (False, True):
        for separators in ((",", ":"), (", ", ": ")):
            with pytest.raises(Fault, match=f"it sent sample {index} of 2"):
                feed(Reading(samples(2), incremental), [[json.dumps(event, separators=separators).encode()]])


def test_what_follows_the_end_of_a_sample_is_not_read() -> None:
    said = Said([11, 12], ["a", "b"], "eos", 5, [-1.0, -2.0])
    found = samples(2)
    reading = Reading(found, False)
    feed(reading, [[said.event(0, 2, incremental=False, index=1)]] * 2)
    assert got(found[1]) == said.whole()
    assert got(found[0]) == Delta()


def test_minus_infinity_is_null_in_json() -> None:
    assert alternatives([[None, 3, None], [-0.5, 4, "x"]]) == {3: -math.inf, 4: -0.5}


def test_a_body_says_what_sampling_says() -> None:
    def said(**options: Any) -> dict[str, Any]:
        return json.loads("{" + wire_settings(Sampling(**options)) + '"n":1}}')

    plain = said()
    params = plain.pop("sampling_params")
    assert plain == {}
    assert params == {
        "temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": False,
        "no_stop_trim": True, "skip_special_tokens": True, "n": 1,
    }  # fmt: skip
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "ignore_eos": True}
    full = said(**sampling, stop=('"x"', "\n"), stop_ids=(3,), top_logprobs=4)
    assert (full["return_logprob"], full["top_logprobs_num"]) == (True, 4)
    expected = params | sampling | {"stop": ['"x"', "\n"], "stop_token_ids": [3]}
    assert full["sampling_params"] == expected
    assert said(logprobs=True)["return_logprob"] is True
    assert "top_logprobs_num" not in said(logprobs=True)
    steered = said(
        frequency_penalty=0.5,
        presence_penalty=-1.0,
        repetition_penalty=1.2,
        logit_bias=((3, -math.inf), (9, 2.5)),
        json_schema="{}",
    )
    assert steered["sampling_params"] == params | {
        "frequency_penalty": 0.5,
        "presence_penalty": -1.0,
        "repetition_penalty": 1.2,
        "logit_bias": {"3": -1e9, "9": 2.5},
        "json_schema": "{}",
    }
    assert said(regex='"[a-z]"')["sampling_params"] == params | {"regex": '"[a-z]"'}
    assert "return_logprob" not in said(regex="a", logprobs=True)  # they come from a scoring pass
