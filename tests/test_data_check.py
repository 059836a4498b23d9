"""Demonstrations as text: their columns, where they may lie, and what is wrong with them, by row, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestra.cli import main
from orchestra.errors import UsageError
from orchestra.training.checks import Counts, check
from orchestra.training.texts import example, read_records, untagged

BLOCK = (
    "<Parallel><Goal>both<Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
    "<Path>\n1: up up up</Path><Path>\n2: down</Path><Conclusion>so</Conclusion></Parallel>"
)
GOOD = {"prompt": "Go?", "completion": f"Well.\n{BLOCK} done"}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_messages_and_prompt_with_completion_say_the_same() -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Go?"}]
    said = {"role": "assistant", "content": BLOCK}
    one = example({"messages": [*chat, said], "language": "multiverse", "prompt": None})
    assert one == example({"prompt": chat, "completion": [said]}, "multiverse")
    assert (one.prompt, one.text, one.language) == (chat, BLOCK, "multiverse")
    assert one.suffixed("!").prompt == [chat[0], {"role": "user", "content": "Go?!"}]
    assert example(GOOD).suffixed("!").prompt == "Go?!"


def test_plain_text_is_the_text_without_its_tags_or_what_the_row_says() -> None:
    assert example(GOOD, "multiverse").plain == "Well.\nboth1: a2: b\n1: up up up\n2: downso done"
    assert example(GOOD | {"plain": "short"}, "multiverse").plain == "short"
    assert untagged("<Goal>", "plain") == "<Goal>"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "neither messages nor prompt and completion: it has text"),
        ({"prompt": "x", "completion": " "}, "completion: is empty"),
        ({"prompt": "x", "completion": "y", "language": "multivers"}, "did you mean 'multiverse'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last one is to be the assistant's"),
        ({"messages": [{"role": "user"}]}, "messages: not a list of messages with role and content"),
        ({"prompt": "x", "completion": "y", "children": "z"}, "children and workers are lists of texts"),
    ],
)
def test_wrong_columns_get_a_clear_line(record: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        example(record)


def test_jsonl_parquet_and_folders_of_datasets_are_read_alike(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [GOOD | {"language": "multiverse"}, {"prompt": "a", "completion": "b", "language": "plain"}]
    lines = write(tmp_path / "d.jsonl", records[0], "", records[1])
    made = datasets.Dataset.from_list(records)
    made.to_parquet(str(tmp_path / "d.parquet"))
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"dev": made}).save_to_disk(str(tmp_path / "several"))
    places = {lines: "train", tmp_path / "d.parquet": "train", tmp_path / "one": "train", tmp_path / "several": "dev"}
    for place, split in places.items():
        assert [example(record) for record in read_records(str(place), split)] == [example(r) for r in records]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("owner/name", "needs its revision"),
        ("./nowhere", "no Hugging Face id"),
        ("nowhere.jsonl", "cannot read nowhere.jsonl"),
    ],
)
def test_what_cannot_be_read_is_said(path: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_records(path)


def test_findings_have_row_line_and_column() -> None:
    unclosed = {"prompt": "Go?", "completion": f"Well.\n  {BLOCK}\nand <Parallel><Goal>no"}
    spoken = {"prompt": "Q", "completion": "a <FORK-1>b</FORK-1>\nc </FORK-2>", "language": "async_think"}
    late = {"prompt": "numbers: 3 7 target: 9", "completion": "x", "language": "apr", "children": ["one"]}
    records = [(1, GOOD), (2, json.dumps(unclosed)), (3, "{"), (4, spoken), (5, late), (7, {"prompt": "x"})]
    counts = Counts()
    found = [(f.row, f.place, f.message) for f in check(records, counts, language="multiverse")]
    assert found[:3] == [
        (2, "5:5", "<Parallel> is not closed"),
        (2, "5:15", "<Goal> has no outlines"),
        (2, "5:15", "<Goal> is not closed"),
    ]
    assert found[3][:2] == (3, "")
    assert found[3][2].startswith("not JSON")
    assert (4, "2:3", "</FORK-2> closes nothing") in found
    assert (5, "", "more children are told than are asked for: 1") in found
    assert found[-1][0] == 7
    assert counts.rows == 1


def test_counts_are_those_of_the_texts() -> None:
    joined = "a <FORK-1>b</FORK-1> c d <JOIN-1><RETURN-1>e</RETURN-1> f"
    asked = {"prompt": "Q", "completion": joined, "language": "async_think", "workers": ["x y <RETURN>e</RETURN>"]}
    records = [GOOD, {"prompt": "Q", "completion": "one two", "language": "plain"}, asked]
    counts = Counts()
    assert list(check(enumerate(records, 1), counts, language="multiverse")) == []
    assert (counts.rows, counts.parallel, counts.blocks, counts.threads) == (3, 2, 2, 3)
    # Each generation ends with an end token or with the tag that it is stopped at; words and signs are counted.
    tag, end = 3, 1
    plan = 2 + tag + tag + 1 + 2 * (tag + 3 + tag + 1) + tag + 1
    paths = (3 + tag + 1, 1 + tag + 1)
    rest = 1 + 2 * (tag + 1) + 1 + end
    assert counts.total[0] == plan + sum(paths) + rest
    assert counts.longest[0] == plan + max(paths) + rest
    assert counts.beside[0] == sum(paths)
    assert (counts.total[1], counts.longest[1], counts.beside[1]) == (3, 3, 0)
    lengths = dict(counts.table("words"))
    assert lengths["total / longest"] == f"{sum(counts.total) / sum(counts.longest):.2f}"


def test_the_command_ends_with_1_if_a_row_is_malformed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write(tmp_path / "d.jsonl", GOOD, GOOD | {"completion": "\n <Goal>"}))
    assert main(["data", "check", file, "--language", "multiverse"]) == 1
    out, err = capsys.readouterr()
    assert out.startswith("row 2, 2:2: ")
    assert err == f"orchestra: 1 of 2 rows of {file} are not right\n"
    good = str(write(tmp_path / "good.jsonl", GOOD))
    assert main(["data", "check", good, "--language", "multiverse"]) == 0
    out, err = capsys.readouterr()
    assert "threads a block" in out
    assert main(["data", "check", good, "--language", "multiverse", "--max-tokens", "20"]) == 1
    assert "more than 20" in capsys.readouterr().out
    assert main(["data", "check", good, "--language", "english"]) == 2
