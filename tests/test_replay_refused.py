"""What a recorded sample cannot be, and files that are no recordings: refused in one line that says why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recordings import at_rest, line, recorder, run, write

import orchestra
from orchestra import Thread, strategy
from orchestra.errors import CapabilityError, OrchestraError, PromptError, UsageError
from orchestra.runtime.recording import Recording
from orchestra.runtime.replay import ReplayEngine


@pytest.fixture
def engine(tmp_path: Path) -> Callable[..., ReplayEngine]:
    return recorder(tmp_path)


@strategy
async def goes_on(thread: Thread) -> Thread:
    return await (await thread.generate()).generate()


@strategy
async def writes(thread: Thread) -> Thread:
    return await thread.append("Well,").generate()


@strategy
async def joins(thread: Thread, how: Any = "reuse") -> Thread:
    branches = await thread.fork(2).generate()
    return await thread.join(branches, " so" if how == "reuse" else "", how=how).generate()


@strategy
async def feeds_back(thread: Thread) -> Thread:
    return await thread.spawn(["Another question"])[0].generate()


@strategy
async def asks_again(thread: Thread) -> Thread:
    return await thread.spawn([thread.prompt])[0].generate()


@strategy
async def nests(thread: Thread) -> Thread:
    return await thread.fork(2)[1].fork(2)[0].generate()


@strategy
async def twice(thread: Thread) -> Thread:
    await thread.generate()
    return await thread.fork(1)[0].generate()


@strategy
async def stops(thread: Thread, sampling: dict[str, Any]) -> Thread:
    return await thread.generate(**sampling)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("spawn_join", r"spawn_join needs continue, which replay:samples.jsonl cannot \(recorded samples cannot be"),
        ("best_of", "best_of needs logprobs.*local:"),
        (goes_on(), "cannot go on after a sampled thread: recorded samples cannot be continued; use a local: engine"),
        (writes(), "cannot go on after text that a strategy writes: recorded samples cannot be continued"),
        (joins(), "recorded samples cannot be continued|text that a strategy writes"),
        (joins(how="recompute"), "cannot go on after text that a strategy writes"),
        (feeds_back(), "samples of the run's own prompt, not of one that a strategy writes; local:PATH"),
        (nests(), r"one fork index, and a thread was forked 2 times \(path \(1, 0\)\)"),
        ("first_finish(samples=2, drafts=self_consistency(samples=2))", "one fork index"),
        (twice(), "sample 0 of item 'sums/a' was asked for twice in one run"),
        ("self_consistency(samples=4)", r"sample 3 of item 'sums/a' was asked for, but samples.jsonl has 3 \(0 to 2\)"),
        (stops(sampling={"stop": "42"}), "recorded without the stop string '42' and goes on after it"),
        (stops(sampling={"stop_ids": 3}), "no token ids and log-probabilities: no stop_ids for sample 0"),
        (stops(sampling={"top_logprobs": 2}), "no top_logprobs for sample 0"),
        (stops(sampling={"logprobs": True}), "no logprobs for sample 0"),
        (stops(sampling={"ignore_eos": True}), "ended by itself: ignore_eos cannot be honoured"),
    ],
)
def test_refused(engine: Any, spec: Any, message: str) -> None:
    replay = engine(*[8] * 3, text="it is 42.")
    with pytest.raises(CapabilityError if "sample " not in message else UsageError, match=message) as caught:
        run(replay, spec)
    assert "\n" not in str(caught.value)
    at_rest(replay)


def test_not_refused_where_it_makes_no_difference(engine: Any) -> None:
    replay = engine(*[8] * 3, text="it is 42.")
    for sampling in ({"stop": ["43", "."]}, {"temperature": 1.5, "top_p": 0.5, "top_k": 3, "min_p": 0.1}):
        assert run(replay, stops(sampling=sampling)).text == "it is 42."
    assert run(replay, asks_again()).text == "it is 42."
    cut = engine(8, text="it is 42.", finish_reason="length")
    assert run(cut, stops(sampling={"ignore_eos": True})).text == "it is 42."


def test_a_later_repeat_of_a_strategy_that_forks_would_be_the_first_again(engine: Any) -> None:
    with pytest.raises(UsageError, match="repeat 1 of a strategy that forks would be repeat 0 again; use --repeats 1"):
        run(engine(8, 8), "self_consistency(samples=2)", repeat=1)
    with pytest.raises(UsageError, match=r"sample 2 of item 'sums/a' .* has 2 \(0 to 1\)"):
        run(engine(8, 8), "sample", repeat=2)
    with pytest.raises(PromptError, match="empty"):
        run(engine(8, 8), "sample", " ")


def test_a_failed_sample_is_refused_when_it_is_asked_for(tmp_path: Path) -> None:
    failed = {"task": "sums", "id": "a", "repeat": 1, "error": "connection\nlost", "text": "", "usage": {"requests": 0}}
    replay = ReplayEngine(write(tmp_path / "r.jsonl", [line(0), failed, line(4), line(2)]))
    assert run(replay, "self_consistency(samples=1)").answer == "7"
    with pytest.raises(UsageError, match=r"sample 1 of item 'sums/a' failed when it was recorded \(connection lost\)"):
        run(replay, "self_consistency(samples=3)")
    with pytest.raises(UsageError, match=r"sample 3 .* r.jsonl has 4 \(0 to 4 without 3\)"):
        run(replay, "sample", repeat=3)
    assert replay.facts()["records"] == 3


GOOD = json.dumps(line(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.jsonl has no samples: it is empty"),
        ("\n \n", "r.jsonl has no samples: it is empty"),
        (GOOD + "\n" + GOOD[:-9], r"line 2: not JSON \(.*cut off"),
        (GOOD + "\nnonsense\n" + GOOD, "line 2: not JSON"),
        ("\n[1]\n", "line 2: a recorded sample is a JSON object, not list"),
        (GOOD + "\n\n" + GOOD, "line 3: repeat 1 of item 'a' of task 'sums' is in line 1 already"),
        (json.dumps(line(-1)), "line 1: repeat: input should be greater than or equal to 0"),
        (json.dumps(line(id=7)), "line 1: id: input should be a valid string"),
        (json.dumps(line(finish_reason="cancelled")), "line 1: finish_reason: input should be 'stop' or 'length'"),
        (json.dumps(line(sampled_tokens="many")), "line 1: sampled_tokens: input should be a valid integer"),
        (json.dumps(line(sampled_tokens=0)), "line 1: sampled_tokens: 0 for a text of 10 characters"),
        (json.dumps(line(confidence=float("nan"))), "line 1: confidence: input should be a finite number"),
        (json.dumps({k: v for k, v in line().items() if k != "text"}), "line 1: text: field required$"),
        (json.dumps({k: v for k, v in line(usage={}).items() if k != "task"}), "line 1: task: .*older version"),
        (json.dumps(line(usage={"requests": 9})), "line 1: the outcome of a strategy with 9 generations, not one sample"
         "; record with --strategy sample --repeats N"),
        (b"\xff\n", "line 1: not JSON"),
    ],
)  # fmt: skip
def test_malformed_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as caught:
        run(ReplayEngine(path), "sample")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_last_line_without_its_end_is_whole_if_it_parses(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes((json.dumps(line(0, text="a\u2028b\x00")) + "\r\n" + GOOD).encode())
    recording = Recording(tmp_path / "r.jsonl")
    assert len(recording) == 2
    sample = recording.sample(("sums", "a"), 0)
    assert sample.text == "a\u2028b\x00"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("replay:", "a replay engine needs recorded samples: replay:FILE.jsonl"),
        ("replay:no/such.jsonl", "cannot read the recorded samples in no/such.jsonl: No such file"),
        ("replay:.", "cannot read the recorded samples in .: Is a directory"),
        ("replay:x.jsonl?rate=fast", "engine parameter rate = 'fast' is not a number"),
        ("replay:x.jsonl?rate=0", "rate must be tokens a second, above 0, got 0"),
        ("replay:x.jsonl?rate=nan", "above 0, got nan"),
        ("replay:x.jsonl?speed=3", "unknown engine parameter 'speed'.*known: rate"),
    ],
)
def test_bad_urls(url: str, message: str) -> None:
    async def main() -> None:
        async with orchestra.connect(url):
            pass

    with pytest.raises(OrchestraError, match=message):
        asyncio.run(main())
