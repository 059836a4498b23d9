"""Every strategy has a page, whose examples run as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from orchestra.spec import parse_strategy
from orchestra.strategies import registry

PAGES = Path(__file__).parents[1] / "docs" / "strategies"
HEADINGS = [
    "## What it does",
    "## When it pays",
    "## What it costs",
    "## Example",
    "## Figures of the paper",
    "## Differences",
]
ELSEWHERE = ("sglang://127.0.0.1:30000", "local:Qwen/Qwen3-8B")
IN_STREAMS = "local:ParScale/ParScale-1.8B-P4"
BUILT_IN = [name for name, kind in registry().items() if kind.__module__.startswith("orchestra.strategies.")]


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def code(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page(name), re.S | re.M)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_page_of_a_strategy(name: str) -> None:
    text = page(name)
    assert text.startswith(f"# {name}\n\n")
    assert re.findall(r"^## .*", text, re.M) == HEADINGS
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert f"[`{name}`]({name}.md)" in index


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} - {"README"} == set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_command_lines_name_strategies_that_there_are(name: str) -> None:
    found = 0
    for line in "".join(code(name, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for flag in ("--strategy", "-s"):
            if flag in words:
                parse_strategy(words[words.index(flag) + 1])
                found += 1
    assert found


@pytest.fixture(scope="module")
def in_streams(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    from stream_folders import write

    return write(tmp_path_factory.mktemp("parscale") / "P4", tiny, 4)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_examples_run(name: str, tiny: str, in_streams: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the embedded model as they stand; where they name another engine, on a tiny random model in its place."""
    blocks = code(name, "python")
    assert blocks
    for block in blocks:
        for engine in ELSEWHERE:
            block = block.replace(engine, f"local:{tiny}")
        block = block.replace(IN_STREAMS, f"local:{in_streams}")
        exec(compile(block, f"{name}.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
