"""`orchestra data preview`: a row as a table, a page and a picture."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from test_flatten import two_children

from orchestra.training import preview
from orchestra.training.flatten import dense_mask, flatten

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    Dataset.from_list([flatten(two_children()).columns()]).save_to_disk(str(folder))
    return folder


@pytest.fixture
def orchestra(capsys: pytest.CaptureFixture[str]) -> Main:
    from orchestra.cli import main

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (main(list(words)), *capsys.readouterr())

    return call


def test_the_terminal_shows_who_sees_whom(orchestra: Main, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    code, out, err = orchestra("data", "preview", str(rows))
    assert code == 0, err
    seen = re.findall(r"[█·]{11}", out)
    assert [[mark == "█" for mark in line] for line in seen] == dense_mask(flatten(two_children())).tolist()
    assert out.count("echo") == 1
    code, out, _ = orchestra("data", "preview", str(rows), "--entries", "2:5")
    assert code == 0
    assert re.findall(r"[█·]{3}\b|[█·]{3} ", out)
    assert "3 are shown" in out


def test_a_page_holds_every_square_of_the_mask_and_escapes_text() -> None:
    row = flatten(two_children())
    words = ["<script>alert(1)</script>"] * len(row)
    page = preview.html(row, words)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == len(row)
    cell = int(re.search(r'height="(\d+)" fill', page)[1])  # type: ignore[index]  # it is there
    squares = set()
    for x, y, width in re.findall(r'<rect x="(\d+)" y="(\d+)" width="(\d+)"', page):
        squares |= {(int(y) // cell, column) for column in range(int(x) // cell, (int(x) + int(width)) // cell)}
    assert squares == {tuple(place) for place in dense_mask(row).nonzero().tolist()}


def test_pictures_are_written(orchestra: Main, rows: Path, tmp_path: Path) -> None:
    for name, begins in (("row.png", b"\x89PNG"), ("row.html", b"<!doctype html>")):
        code, out, err = orchestra("data", "preview", str(rows), "--out", str(tmp_path / name))
        assert code == 0, err
        assert out.strip() == str(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing-here"], "nothing-here"),
        (["ROWS", "--row", "7"], "there is no row 7"),
        (["ROWS", "--entries", "a:b"], "--entries is of the form A:B"),
        (["ROWS", "--entries", "50:60"], "the row has entries 0 to 10"),
        (["ROWS", "--out", "x.gif"], "--out is a .html or .png file"),
        (["ROWS", "--model", "no-such-folder/x"], "no-such-folder"),
    ],
)
def test_what_cannot_be_shown_is_one_line(orchestra: Main, rows: Path, words: list[str], message: str) -> None:
    code, out, err = orchestra("data", "preview", *(str(rows) if word == "ROWS" else word for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
