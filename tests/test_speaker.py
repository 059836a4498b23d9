"""Strategies on a model that speaks their languages: what comes is the play, token by token, on every engine."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import speaker as recipe
from conftest import started
from plays import PLAYS, Play, after
from rehearsal import BOS, EOS, perform, rehearse
from speaker import MARGIN, batches, build, margin, rows_of

from orchestra import Thread, strategy
from orchestra.graph import Node, ThreadGraph
from orchestra.outcome import Outcome
from orchestra.runtime.connect import open_engine
from orchestra.runtime.local.model import load_plain
from orchestra.runtime.sglang_server import SGLangServer
from orchestra.testing import check_parity, check_strategy
from orchestra.thread import Join

NAMED = {play.name: play for play in PLAYS}
SHOWN = {"skip_special_tokens": False}


def shape(graph: ThreadGraph) -> dict[Any, Any]:
    """All of a graph but the order of its nodes, which is a matter of time, and its times."""

    def name(node: int) -> tuple[tuple[int, ...], int]:
        return tuple(graph.nodes[node].path), graph.nodes[node].start

    def told(node: Node) -> Any:
        context = {(name(parent), length) for parent, length in node.context}
        waits = {name(wait) for wait in node.waits}
        return context, waits, node.origins, node.tokens, node.text, node.finish_reason

    names = {name(node.id): told(node) for node in graph.nodes}
    assert len(names) == len(graph.nodes), "two nodes of one path begin at one position"
    return names


def assert_played(play: Play, outcome: Outcome) -> None:
    """The outcome is that of the rehearsal."""
    expected = rehearse(play)
    assert shape(outcome.graph) == shape(expected.graph), play.name
    assert outcome.text == expected.text, play.name
    assert outcome.answer == expected.answer, play.name
    assert outcome.candidates == [
        replaced.model_copy(update={"logprob": given.logprob, "logprob_tokens": given.logprob_tokens})
        for replaced, given in zip(expected.candidates, outcome.candidates, strict=True)
    ], play.name
    measured = {"wall_seconds", "cached_tokens"}
    assert outcome.usage.model_dump(exclude=measured) == expected.usage.model_dump(exclude=measured), play.name


@pytest.mark.parametrize("play", PLAYS, ids=lambda play: play.name)
def test_a_play_in_process(speaker: str, play: Play) -> None:
    async def main() -> Outcome:
        engine = open_engine(f"local:{speaker}")
        try:
            return await perform(engine, play)
        finally:
            await engine.close()

    assert_played(play, asyncio.run(main()))


def test_plays_together_in_one_batch(speaker: str) -> None:
    async def main() -> list[Outcome]:
        engine = open_engine(f"local:{speaker}")
        try:
            return await asyncio.gather(*(perform(engine, play) for play in PLAYS))
        finally:
            await engine.close()

    for play, outcome in zip(PLAYS, asyncio.run(main()), strict=True):
        assert_played(play, outcome)


@pytest.mark.parametrize("name", ["outlined", "nested_reuse", "nested_recompute", "spawn_join"])
def test_the_laws_hold_on_it(speaker: str, name: str) -> None:
    play = NAMED[name]

    async def main() -> None:
        engine = open_engine(f"local:{speaker}")
        try:
            outcome = await check_strategy(engine, play.strategy, play.prompt, temperature=0, **play.settings)
            assert_played(play, outcome)
            await check_parity(engine, outcome.graph)
            await engine.release(outcome.graph)
        finally:
            await engine.close()

    asyncio.run(main())


def test_plays_on_a_real_server(speaker: str, tmp_path: Path) -> None:
    """All that need no reuse join, at once, by the model whose tags are special tokens."""

    async def main(port: int) -> None:
        engine = open_engine(f"sglang://127.0.0.1:{port}")
        plays = [play for play in PLAYS if all(len(node.context) < 2 for node in rehearse(play).graph.nodes)]
        assert {"spawn_join", "nested_recompute", "letters"} <= {play.name for play in plays}
        try:
            for play, outcome in zip(
                plays, await asyncio.gather(*(perform(engine, play, **SHOWN) for play in plays)), strict=True
            ):
                assert_played(play, outcome)
        finally:
            await engine.close()

    with started(SGLangServer, str(Path(speaker).with_name("special")), tmp_path / "server.log") as server:
        asyncio.run(main(server.port))


def test_it_knows_its_plays_by_a_margin(speaker: str) -> None:
    assert margin(load_plain(speaker), batches(rows_of(PLAYS))) > MARGIN - 0.01


# -- the builder -------------------------------------------------------------------------------------------------------


def test_a_rehearsal_ends_as_engines_do() -> None:
    graph = rehearse(NAMED["spawn_join"]).graph
    prompt = graph.nodes[0].tokens
    assert (prompt[0], len(prompt)) == (BOS, 1 + len("numbers: 3 7 8 12 target: 55"))
    turns = [node for node in graph.nodes if node.count("sampled")]
    # The parent's first turn ends by a stop string, the others by the end-of-sequence token.
    assert [turn.tokens[-1] == EOS for turn in turns] == [False, True, True, True, True]
    assert turns[0].text.endswith(" join:")
    assert rehearse(NAMED["cut"]).finish_reason == "length"


def test_a_join_leaves_out_the_end_of_sequence() -> None:
    """A branch that ended by itself is read up to its last token of text, by reuse and by recompute."""

    @strategy
    async def ended(thread: Thread, how: Join = "reuse") -> Thread:
        return await thread.join(await thread.fork(["a", "b"]).generate(), "c", how=how).generate()

    script = after({"a": "x", "b": "yy", "c": "z"})
    graph = rehearse(Play("", ended(how="reuse"), "?", script)).graph
    assert [(edge.length, len(graph.nodes[edge.parent])) for edge in graph.nodes[-1].context] == [(2, 3), (3, 4)]
    graph = rehearse(Play("", ended(how="recompute"), "?", script)).graph
    assert graph.nodes[-1].text == "axbyycz"
    assert graph.nodes[-1].tokens.count(EOS) == 1


def test_plays_that_contradict_each_other_are_named() -> None:
    play = NAMED["answer"]
    other = replace(play, name="other", script=after({"?": "<think>Two and three</think>"}))
    with pytest.raises(
        ValueError, match=r"plays answer and other: after '2 \+ 2\?<think>Two and t' come both 'w' and 'h'"
    ):
        rows_of([play, other])
    rows_of([play, replace(other, prompt="2 + 3?")])


def test_two_sessions_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plays = [NAMED["cut"]]
    train, trained = recipe.train, []

    def slow(rows: Any) -> Any:
        trained.append(len(rows))
        if len(trained) == 1:
            other.append(build(tmp_path, plays))  # begins later and is done first
        return train(rows)

    other: list[Path] = []
    monkeypatch.setattr(recipe, "train", slow)
    (tmp_path / "making-old").mkdir()
    os.utime(tmp_path / "making-old", (0, 0))
    assert build(tmp_path, plays) == other[0] == build(tmp_path, plays)
    assert len(trained) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == [other[0].parent.name]
    build(tmp_path, [NAMED["answer"]])
    assert len(trained) == 3, "other plays, another model"


@pytest.mark.parametrize("asked", [{}, SHOWN])
def test_tags_may_be_special_tokens(speaker: str, asked: dict[str, bool]) -> None:
    """Strategies that live by tags have them shown; others are asked to."""

    async def main(plays: list[Play]) -> list[Outcome]:
        engine = open_engine(f"local:{Path(speaker).with_name('special')}")
        try:
            return await asyncio.gather(*(perform(engine, play, **asked) for play in plays))
        finally:
            await engine.close()

    plays = [play for play in PLAYS if asked or str(play.strategy).startswith(("map_reduce", "threads", "async_think"))]
    assert len(plays) >= 9
    for play, outcome in zip(plays, asyncio.run(main(plays)), strict=True):
        assert_played(play, outcome)
