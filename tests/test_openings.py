"""What a model's folder says about its languages is forced by strategies, unless the user says otherwise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from playing import after

import orchestra
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.openings import openings_in, openings_of
from orchestra.testing.scripted import ScriptedEngine

WEAVER = {"thread_weaver": "\n<Parallel>\n<Outlines>"}
REPLIES = (
    ("1:", " one</Thread>"),
    ("2:", " two</Thread>"),
    ("</Thread>\n", "</Parallel> done"),
    ("<Outlines>", "\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"),
)


def weaver(openings: dict[str, str]) -> ScriptedEngine:
    engine = ScriptedEngine(after(*REPLIES, ("", "no threads")))
    engine.openings = openings
    return engine


def test_a_folder_s_opening_is_forced_and_read_by_the_strategy() -> None:
    outcome = orchestra.run("threads", "go", engine=weaver(WEAVER))
    assert outcome.text.startswith(WEAVER["thread_weaver"])
    assert outcome.text.endswith("done")
    assert "1: one</Thread><Thread>\n2: two" in outcome.text
    assert orchestra.run("threads", "go", engine=weaver({})).text.strip() == "no threads"


def test_the_user_s_opening_comes_first() -> None:
    spec = {"strategy": "threads", "opening": ""}
    assert orchestra.run(spec, "go", engine=weaver(WEAVER)).text.strip() == "no threads"
    given = {"strategy": "threads", "opening": WEAVER["thread_weaver"]}
    assert orchestra.run(given, "go", engine=weaver({})).text.endswith("done")


def test_an_organiser_s_first_fork_may_be_opened() -> None:
    replies = (
        ("<FORK-1>", " what is 6 * 7?</FORK-1>"),
        ("</FORK-1>", " meanwhile <JOIN-1>"),
        ("what is 6 * 7?", "42"),
        ("</RETURN-1>", " so 42"),
    )
    engine = ScriptedEngine(after(*replies))
    engine.openings = {"async_think": "<FORK-1>"}
    outcome = orchestra.run("async_think", "go", engine=engine)
    assert "<RETURN-1>42</RETURN-1> so 42" in outcome.text


def test_drafts_are_shown_in_the_model_s_own_words() -> None:
    asked: list[str] = []

    def script(context: str, path: tuple[int, ...]) -> str:
        asked.append(context)
        return r"the answer is \boxed{7} ."

    for spec in ("refine(rounds=1)", "pdr(widths=[2], distiller='random_k', k=2)"):
        asked.clear()
        engine = ScriptedEngine(script)
        engine.openings = {"drafts": "drafts:\n{answers}"}
        assert orchestra.run(spec, "go", engine=engine).answer == "7"
        shown = "\n".join(f"{i}: 7" for i in range(1, 2 if spec.startswith("refine") else 3))
        assert asked[-1] == f"go\n\ndrafts:\n{shown}"


def test_a_model_folder_tells_its_openings(tiny: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["orchestra"] = {"openings": {**WEAVER, "broken": 3}}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert openings_in(str(folder)) == WEAVER
    assert openings_in(str(tmp_path / "nowhere")) == openings_in(tiny) == {}

    async def opened(source: str) -> dict[str, str]:
        engine = LocalEngine(source)
        try:
            return dict((await engine.open()).openings)
        finally:
            await engine.close()

    import asyncio

    assert asyncio.run(opened(str(folder))) == WEAVER
    assert asyncio.run(opened(tiny)) == {}


@pytest.mark.parametrize("said", [None, 3, [], {"openings": None}, {"openings": [1]}, {"openings": {"a": 1, 2: "b"}}])
def test_what_has_another_shape_is_left_out(said: object) -> None:
    assert openings_of(said) == {}
