"""What the tests of the voting strategies share."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from playing import play

import orchestra
from orchestra import Candidate, Outcome
from orchestra.runtime.connect import open_engine
from orchestra.runtime.engine import Engine, Request, Stream
from orchestra.runtime.replay import ReplayEngine
from orchestra.testing import check_strategy
from orchestra.testing.scripted import Script, ScriptedEngine

PROMPT = "numbers: 9 11 12 14 target: 27"
"""What the embedded model solves in many ways, of 500 to 2000 tokens at temperature 1."""


class Grouped(ScriptedEngine):
    """Counts the members of the groups that it is asked for."""

    def __init__(self, script: Script) -> None:
        super().__init__(script)
        self.groups: list[int] = []

    def generate_group(self, requests: Sequence[Request]) -> list[Stream]:
        self.groups.append(len(requests))
        return super().generate_group(requests)


def run(
    spec: Any, script: Script | None = None, *, engine: Engine | None = None, prompt: str = "go", **settings: Any
) -> Outcome:
    """See `play`."""
    return play(spec, engine or script or (lambda *_: "$"), prompt, **settings)


def votes(outcome: Outcome) -> list[tuple[str | None, float]]:
    return [(candidate.answer, candidate.weight) for candidate in outcome.candidates]


def charged(outcome: Outcome) -> list[int]:
    """Sampled tokens by fork index."""
    tokens: dict[int, int] = {}
    for node in outcome.graph.nodes:
        if node.started is not None:
            tokens[node.path[-1]] = tokens.get(node.path[-1], 0) + node.count("sampled")
    return [tokens[index] for index in sorted(tokens)]


def laws_on_the_embedded_model(spec: str, **settings: Any) -> Outcome:
    async def main() -> Outcome:
        engine = open_engine("demo")
        try:
            return await asyncio.wait_for(check_strategy(engine, spec, PROMPT, **settings), 120)
        finally:
            await engine.close()

    return asyncio.run(main())


def laws_on(engine: Engine, spec: Any, **settings: Any) -> Outcome:
    return asyncio.run(asyncio.wait_for(check_strategy(engine, spec, "go", **settings), 60))


def voter(answer: str | None, weight: float = 1.0) -> Candidate:
    return Candidate(text=str(answer), answer=answer, weight=weight)


# -- many recorded items -----------------------------------------------------------------------------------------------


def replayed(path: Path, spec: Any, items: Sequence[Sequence[tuple[int, str]]]) -> list[Outcome]:
    """Run on items whose samples are given as (tokens, answer)."""
    with path.open("w") as file:
        for item, samples in enumerate(items):
            for repeat, (tokens, answer) in enumerate(samples):
                line = {"task": "t", "id": str(item), "repeat": repeat, "text": "x", "sampled_tokens": tokens}
                file.write(json.dumps(line | {"finish_reason": "stop", "answer": answer}) + "\n")

    async def main() -> list[Outcome]:
        async with orchestra.connect(ReplayEngine(path)) as connection:
            return [await connection.run(spec, "go", item=f"t/{item}") for item in range(len(items))]

    return asyncio.run(main())


def binomial(n: int, k: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


def close(rate: float, expected: float, runs: int, errors: float = 4.0) -> bool:
    """Whether a rate over so many runs is its expectation, within so many standard errors."""
    return abs(rate - expected) <= errors * math.sqrt(max(expected * (1 - expected), 1e-6) / runs)
