"""`orchestra data make`: rows that flatten gives, texts that parse, the same for the same seed, clear refusals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("datasets")

import datasets
from typer.testing import CliRunner

from orchestra.cli.data import app
from orchestra.errors import UsageError
from orchestra.protocols import PROTOCOLS
from orchestra.protocols.async_think import UNJOINED
from orchestra.training import text_tokenizer, tokenizer
from orchestra.training.flatten import Row
from orchestra.training.made import TASKS, Wanted, make


@pytest.mark.parametrize("task", TASKS)
def test_rows_and_texts_say_the_same(task: str, tmp_path: Path) -> None:
    out = tmp_path / "data"
    counts = make(Wanted(task, rows=18, seed=3), out, "command")
    assert sum(counts.values()) == 18
    rows = datasets.load_from_disk(str(out))
    words = tokenizer.multilingual() if task == "countdown" else text_tokenizer.build()
    for example in rows:
        row = Row.from_columns(example)
        said = words.decode(row.tokens)
        for text in (example["prompt"], example["completion"]):
            pieces = re.split(r"\n|<[^>]+>", text)  # what stands between tags is one stretch of the row
            assert all("".join(piece.split()) in "".join(said.split()) for piece in pieces)
        assert any(row.weights)
        assert tokenizer.UNK not in row.tokens
        if (protocol := PROTOCOLS.get(example["language"])) is not None:
            problems = protocol.validate(example["completion"])
            assert not [one for one in problems if not one.message.endswith(UNJOINED)]
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(f"| {behaviour} |" in card for behaviour in counts)
    assert "command" in card


def test_a_seed_fixes_the_rows(tmp_path: Path) -> None:
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(Wanted("countdown", rows=6, seed=seed), tmp_path / name)
        made.append(datasets.load_from_disk(str(tmp_path / name))["input_ids"])
    assert list(made[0]) == list(made[1]) != list(made[2])


def test_another_model_s_tokens(tiny: str, tmp_path: Path) -> None:
    make(Wanted("arithmetic", rows=2, model=tiny), tmp_path / "data")
    assert not (tmp_path / "data" / "tokenizer").exists()
    rows = datasets.load_from_disk(str(tmp_path / "data"))
    assert all(max(ids) < 267 for ids in rows["input_ids"])


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        (Wanted("sudoku"), "unknown task 'sudoku'"),
        (Wanted("apr", behaviours=("dance",)), "unknown behaviour 'dance' of apr"),
        (Wanted("countdown", level="x"), "unknown Countdown level 'x'"),
        (Wanted("apr", rows=0), "at least 1"),
    ],
)
def test_what_there_is_not_is_refused(wanted: Wanted, line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=line):
        make(wanted, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        make(Wanted("countdown", rows=1), tmp_path)


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "data"
    words = ["make", "countdown", "--rows", "4", "--behaviours", "threads,refine", "--level", "small"]
    result = CliRunner().invoke(app, [*words, "--out", str(out)])
    assert result.exit_code == 0
    assert "2 threads, 2 refine" in result.output
    assert "--behaviours threads,refine" in (out / "README.md").read_text(encoding="utf-8")


def test_generated_texts_lose_nothing_in_their_tokenizer() -> None:
    words = text_tokenizer.build()
    text = "Moving to Node #0,1\nExploring Operation: 38-24=14, Resulting Numbers: [25, 24, 14]\n~No Solution in it!"
    ids = words(text, add_special_tokens=False).input_ids
    assert words.decode(ids) == text == "".join(words.decode([token]) for token in ids)


def test_a_run_s_correct_samples(tmp_path: Path) -> None:
    from orchestra.cli import main

    run, out = tmp_path / "run", tmp_path / "data"
    words = ["eval", "countdown", "--strategy", "spawn_join", "--split", "dev", "--limit", "3", "--traces"]
    assert main([*words, "--out", str(run)]) == 0
    result = CliRunner().invoke(app, ["make", str(run), "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = datasets.load_from_disk(str(out))
    assert 1 <= len(rows) <= 3
    assert all(any(Row.from_columns(row).weights) for row in rows)
