"""What the tests of the replay engine share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orchestra
from orchestra import Outcome, Thread, ThreadGraph
from orchestra.runtime.clock import SimulatedClock
from orchestra.runtime.engine import Load
from orchestra.runtime.replay import ReplayEngine

RATE = 49  # 1 / 49 * 49 is not 1 in floats


def line(repeat: int = 0, tokens: int = 10, answer: str | None = "7", **values: Any) -> dict[str, Any]:
    known = {"task": "sums", "id": "a", "text": "x" * tokens, "finish_reason": "stop"}
    return known | {"repeat": repeat, "sampled_tokens": tokens, "answer": answer} | values


def write(path: Path, lines: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recorder(folder: Path) -> Callable[..., ReplayEngine]:
    """A function from lengths (and answers) to an engine with one item of such samples."""

    def make(*tokens: int, answers: Sequence[str | None] = (), rate: float = RATE, **values: Any) -> ReplayEngine:
        said = answers or [str(i) for i in range(len(tokens))]
        lines = [line(i, n, a, **values) for i, (n, a) in enumerate(zip(tokens, said, strict=True))]
        return ReplayEngine(write(folder / "samples.jsonl", lines), rate=rate)

    return make


def run(engine: ReplayEngine, spec: Any, prompt: Any = "go", **settings: Any) -> Outcome:
    async def main() -> Outcome:
        tasks = asyncio.all_tasks()
        async with orchestra.connect(engine) as connection:
            outcome = await connection.run(spec, prompt, **settings)
        assert asyncio.all_tasks() == tasks
        return outcome

    before = engine.load().sampled_tokens
    outcome = asyncio.run(asyncio.wait_for(main(), 20))
    at_rest(engine)
    assert outcome.usage.sampled_tokens == outcome.graph.count("sampled") == engine.load().sampled_tokens - before
    assert ThreadGraph.from_json(outcome.graph.to_json()) == outcome.graph
    return outcome


def at_rest(engine: ReplayEngine) -> None:
    assert engine.load() == Load(sampled_tokens=engine.load().sampled_tokens)
    assert not engine._timelines


async def passed(thread: Thread, seconds: float) -> None:
    """Wait until so many seconds of the run have passed."""
    clock, over = thread._run.clock, asyncio.Event()
    assert isinstance(clock, SimulatedClock)
    clock.call_at(seconds, over.set)
    await over.wait()


def charged(outcome: Outcome) -> list[int]:
    """Sampled tokens by fork index."""
    forks = [node for node in outcome.graph.nodes if node.started is not None]
    return [node.count("sampled") for node in sorted(forks, key=lambda node: node.path)]
