"""Whatever a model writes, a run ends with an outcome, all that was written is in the trace, and an answer is found."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import orchestra
from orchestra import Outcome
from orchestra.protocols import PROTOCOLS, transcript
from orchestra.runtime.engine import Request, Stream
from orchestra.testing.scripted import EOS, ScriptedEngine

SPECS = {
    "multiverse": "map_reduce(stops=3, paths=3, path_tokens={limit})",
    "multiverse_engine": "map_reduce(language='multiverse_engine', join='recompute', stops=3, paths=3)",
    "thread_weaver": "threads(stops=3, threads=3, thread_tokens={limit})",
    "npr": "map_reduce(language='npr', stops=3, paths=3, path_tokens={limit})",
    "parallel_r1": "map_reduce(language='parallel_r1', stops=2, paths=2)",
    "para_thinker": "map_reduce(language='para_thinker', stops=2, paths=3, path_tokens={limit})",
    "apr": "spawn_join(rounds=2, child_tokens={limit})",
    "async_think": "async_think(stops=6, workers=2)",
}
DEPTH = int(os.environ.get("ORCHESTRA_FUZZ", "0"))


class Babbler(ScriptedEngine):
    """Says tags, parts of tags, code, quotes and words; keeps what it said by itself.

    Each turn is drawn anew from the same few pieces; it breaks its text into tokens anywhere.
    """

    def __init__(self, pieces: list[str], seed: int, limit: int) -> None:
        self.turns: list[str] = []
        self._pieces, self._draw, self._limit = pieces, random.Random(seed), limit
        super().__init__(self._babble)

    def _babble(self, context: str, path: tuple[int, ...]) -> str:
        draw = self._draw
        said = "".join(draw.choices(self._pieces, k=draw.randint(0, self._limit))) if self._pieces else ""
        return said + "\nanswer: 7 " + EOS

    def generate(self, request: Request) -> Stream:
        return super().generate(request)


def alphabet(name: str) -> list[str]:
    tags = list(PROTOCOLS[name].tags)
    tags = [tag for tag in tags if "1" in tag or "2" in tag or not any(c.isdigit() for c in tag)][:16]
    if name == "apr":
        tags = ["\n spawn: 3 + 7 = 10 left: 8 10 12\n", "\n spawn: 9 - 2 = 7 left: 1\n", "spawn:", "join:", "\n join:"]
    whole = [f"{tags[0]}{tags[2]}" if len(tags) > 2 else tags[0], "".join(tags[:4])]
    if name in ("multiverse", "multiverse_engine", "thread_weaver", "npr"):
        language: Any = PROTOCOLS[name]
        outline = f"<{language.outline}>1: a</{language.outline}><{language.outline}>2: b</{language.outline}>"
        opened = f"<{language.block}>" if language.block else ""
        whole += [f"{opened}<{language.plan}>{outline}</{language.plan}>"] * 2
        whole += [f"{opened}<{language.plan}>" + outline * 40 + f"</{language.plan}>"]
    if name == "async_think":
        whole += ["<FORK-1>what?</FORK-1>", "<JOIN-1>", "<FORK-2>what?</FORK-2>", "<JOIN-2>"]
    halves = [tag[: len(tag) // 2] for tag in tags] + [tag[len(tag) // 2 :] for tag in tags]
    rest = ["1:", " 2: x", "1.1:", " word", "\n", " ", "`", "\n```\n", ' "', "'", "<", ">", "é", "none\n"]
    return tags + whole + halves + rest


def check(name: str, pieces: list[str], seed: int, limit: int) -> Outcome:
    engine = Babbler(pieces, seed, max(2, limit))

    async def main() -> Outcome:
        async with orchestra.connect(engine) as connection:
            return await connection.run(SPECS[name].format(limit=limit), "numbers: 3 7 8 12 target: 54", seed=seed)

    outcome = asyncio.run(asyncio.wait_for(main(), 30))
    graph = outcome.graph
    graph.check_integrity()
    assert outcome.stopped_by is None
    assert outcome.usage.sampled_tokens == graph.count("sampled") == engine.load().sampled_tokens
    assert not engine.load().requests
    assert outcome.text == transcript(graph, _end(outcome)), "what the run says is not what the graph says"
    assert outcome.answer == "7", outcome.text
    PROTOCOLS[name].validate(outcome.text)
    return outcome


def _end(outcome: Outcome) -> int:
    """The node with which the chosen thread ended."""
    assert outcome.thread is not None
    assert outcome.thread._node is not None
    return outcome.thread._node.id


@pytest.mark.parametrize("name", SPECS)
def test_the_babble_is_not_all_nonsense(name: str) -> None:
    """Else the tests below would show nothing: it must fork, often, and be wrong, often."""
    forked = wrong = 0
    for seed in range(60):
        outcome = check(name, alphabet(name), seed, 8)
        forked += len({tuple(node.path) for node in outcome.graph.nodes}) > 1
        wrong += bool(PROTOCOLS[name].validate(outcome.text))
    assert forked >= 5
    assert wrong >= 5


@pytest.mark.parametrize("name", SPECS)
@given(data=st.data(), seed=st.integers(0, 2**31), limit=st.integers(1, 12))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_stream_ends_with_an_outcome(name: str, data: st.DataObject, seed: int, limit: int) -> None:
    check(name, data.draw(st.lists(st.sampled_from(alphabet(name)), max_size=8)), seed, limit)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
@given(data=st.data(), seed=st.integers(0, 2**31), limit=st.integers(1, 12))
@settings(max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_stream_ends_with_an_outcome_at_depth(name: str, data: st.DataObject, seed: int, limit: int) -> None:
    check(name, data.draw(st.lists(st.sampled_from(alphabet(name)), max_size=8)), seed, limit)
