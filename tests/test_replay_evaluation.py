"""What `orchestra eval` writes with `--strategy sample`, `replay:` plays: the same answers, other strategies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestra.cli import main
from orchestra.evaluation.store import SAMPLES, SUMMARY, Record, read_records
from orchestra.runtime.recording import Recorded, Recording

ITEMS, REPEATS = 3, 4


def evaluate(out: Path, *words: object, strategy: str = "sample", limit: int = ITEMS) -> int:
    line = ["eval", "countdown", "--strategy", strategy, "--limit", limit, "--out", out, *words]
    return main([str(word) for word in line])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real samples of the embedded model."""
    out = tmp_path_factory.mktemp("recorded")
    assert evaluate(out, "--repeats", REPEATS, "--temperature", 0.6) == 0
    return out


def essence(record: Record) -> tuple[object, ...]:
    return record.key, record.answer, record.correct, record.text, record.finish_reason, record.sampled_tokens


def test_the_samples_of_an_evaluation_are_a_recording(recorded: Path) -> None:
    recording = Recording(recorded / SAMPLES)
    assert (len(recording), len(recording.items)) == (ITEMS * REPEATS, ITEMS)
    for record in read_records(recorded):
        sample = recording.sample(("countdown", record.id), record.repeat)
        assert (sample.text, sample.answer) == (record.text, record.answer)
        assert sample.sampled_tokens == record.usage.sampled_tokens > 0
        assert sample.prompt_tokens == record.usage.prompt_tokens > 0
    line = json.loads((recorded / SAMPLES).read_text().splitlines()[0])
    assert line["task"] == "countdown"
    assert line["finish_reason"] in ("stop", "length")


def test_replayed_one_by_one_they_are_what_they_were(recorded: Path, tmp_path: Path) -> None:
    assert evaluate(tmp_path, "--repeats", REPEATS, "-e", f"replay:{recorded / SAMPLES}?rate=100") == 0
    there, here = read_records(recorded), read_records(tmp_path)
    assert sorted(map(essence, there)) == sorted(map(essence, here))
    for record in here:
        assert record.usage.wall_seconds == record.sampled_tokens / 100
    known, again = (json.loads((folder / SUMMARY).read_text()) for folder in (recorded, tmp_path))
    for name in ("accuracy", "stderr", "maj_at_k", "pass_at_k", "sampled_tokens", "accuracy_within"):
        assert again[name] == known[name], name
    # What came out is a recording again.
    assert len(Recording(tmp_path / SAMPLES)) == ITEMS * REPEATS


def test_first_finish_on_what_was_recorded(recorded: Path, tmp_path: Path) -> None:
    url = f"replay:{recorded / SAMPLES}"
    assert evaluate(tmp_path, "-e", url, strategy=f"first_finish(samples={REPEATS})") == 0
    samples: dict[str, list[Record]] = {}
    for record in sorted(read_records(recorded), key=lambda r: r.key):
        samples.setdefault(record.id, []).append(record)
    outcomes = read_records(tmp_path)
    assert {outcome.id for outcome in outcomes} == samples.keys()
    for outcome in outcomes:
        best = min(samples[outcome.id], key=lambda r: (r.sampled_tokens, r.repeat))
        assert (outcome.text, outcome.answer, outcome.correct) == (best.text, best.answer, best.correct)
        assert outcome.usage.critical_path_tokens == best.sampled_tokens
        assert outcome.usage.requests == REPEATS
        assert outcome.sampled_tokens == sum(
            min(r.sampled_tokens, best.sampled_tokens + (r.repeat < best.repeat)) for r in samples[outcome.id]
        )


@pytest.mark.parametrize(
    ("words", "strategy", "limit", "message"),
    [
        ((), "sample", ITEMS + 1, "has no samples of item 'countdown/small-"),
        (("--level", "hard"), "sample", ITEMS, "(the same task, --level, --split and --limit)"),
        ((), "self_consistency(samples=9)", ITEMS, "samples.jsonl has 4 (0 to 3)"),
        (("--repeats", 2), "self_consistency(samples=2)", ITEMS, "use --repeats 1"),
        ((), "spawn_join", ITEMS, "recorded samples cannot be continued"),
    ],
)
def test_one_clear_error(
    recorded: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[object, ...],
    strategy: str,
    limit: int,
    message: str,
) -> None:
    url = f"replay:{recorded / SAMPLES}"
    assert evaluate(tmp_path, "-e", url, *words, strategy=strategy, limit=limit) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orchestra:")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_folder_of_a_strategy_is_no_recording(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert evaluate(first, "-e", f"replay:{recorded / SAMPLES}", strategy="self_consistency(samples=2)") == 0
    assert evaluate(second, "-e", f"replay:{first / SAMPLES}") == 2
    assert "a strategy with 2 generations, not one sample; record with --strategy sample" in capsys.readouterr().err


def test_going_on_at_another_rate_is_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"replay:{recorded / SAMPLES}"
    assert evaluate(tmp_path, "-e", url) == 0
    assert evaluate(tmp_path, "-e", f"{url}?rate=50", "--repeats", 2) == 0
    assert evaluate(tmp_path, "-e", f"{url}?rate=60", "--repeats", 3) == 2
    assert "rate 50.0 there, 60.0 here" in capsys.readouterr().err


def test_folders_of_the_first_versions_still_load() -> None:
    usage = {"sampled_tokens": 5, "prompt_tokens": 2}
    old = {"id": "a", "repeat": 0, "seed": 1, "text": "t", "finish_reason": "stop", "usage": usage}
    record = Record.model_validate(old)
    assert (record.task, record.sampled_tokens, record.prompt_tokens) == ("", 5, 2)
    assert Record.model_validate_json(record.model_dump_json()) == record
    assert Recorded.model_validate_json(record.model_copy(update={"task": "t"}).model_dump_json()).sampled_tokens == 5
