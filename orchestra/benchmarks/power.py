"""What power sampling costs: particles beside as many plain samples and beside one; resampling after long prompts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from orchestra.benchmarks.report import Column

COLUMNS = (
    Column("way", "way"),
    Column("prompt", "prompt", ","),
    Column("resamplings", "resamplings", ","),
    Column("tokens", "sampled tokens", ","),
    Column("path", "critical path", ","),
    Column("seconds", "seconds", ",.2f"),
    Column("plain", "x as many samples", ".2f"),
    Column("single", "x one sample", ".2f"),
    Column("each", "ms a resampling", ",.1f"),
    Column("mebibytes", "keys and values, MiB", ",.1f"),
)
NOTES = (
    "All ways take turns on one engine, and ignore the end of sequence; the fastest run of each counts. `every B` "
    "resamples each B tokens, whatever the weights are (models with random weights have even ones); a resampling costs "
    "what that takes longer than never resampling. Memory is the peak of an engine of its own, padding included."
)


class Way(NamedTuple):
    """A name, a spec, and sampling settings."""

    name: str
    spec: str
    settings: dict[str, Any]


def ways(particles: int, every: int, alpha: float, moves: int) -> list[Way]:
    """What is compared; the first two are what the others are compared with."""
    smc = f"power_smc(particles={particles}, alpha={alpha}"
    cold = {"temperature": 1 / alpha}
    found = [
        Way(f"{particles} plain samples", f"self_consistency(samples={particles})", cold),
        Way("one plain sample", "sample()", cold),
        Way("power_smc, never", f"{smc}, ess=0)", {}),
        Way("power_smc, by weights", f"{smc})", {}),
        Way(f"power_smc, every {every}", f"{smc}, ess=1, block={every})", {}),
    ]
    if moves:
        found.append(Way(f"power_mh, {moves} moves", f"power_mh(alpha={alpha}, moves={moves})", {}))
    return found


def rows(
    model: str, dtype: str, compared: Sequence[Way], prompts: Sequence[int], tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure each way after prompts of so many letters.

    Args:
        model: a folder; its tokenizer must know any text, or the demo's.
        dtype: of the model.
        compared: see `ways`.
        prompts: lengths in tokens of a byte; 0 for a Countdown problem, which the embedded model understands.
        tokens: of each text.
        repeats: rounds; a first short one is not counted.
    """
    for prompt in prompts:
        measured = asyncio.run(_measure(model, dtype, compared, prompt, tokens, repeats))
        plain, single, never = (measured[i]["seconds"] for i in range(3))
        for way, found in zip(compared, measured, strict=True):
            peak = asyncio.run(_peak(model, dtype, way, prompt, tokens))
            more = found["resamplings"]
            yield found | {
                "way": way.name,
                "spec": way.spec,
                "prompt": prompt or None,
                "resamplings": more if "power_smc" in way.name else None,
                "plain": found["seconds"] / plain,
                "single": found["seconds"] / single,
                "each": 1000 * (found["seconds"] - never) / more if more else None,
                "mebibytes": peak / 2**20,
            }


async def _measure(
    model: str, dtype: str, compared: Sequence[Way], prompt: int, tokens: int, repeats: int
) -> list[dict[str, Any]]:
    import orchestra

    best: list[dict[str, Any]] = [{"seconds": float("inf")} for _ in compared]
    async with orchestra.connect(f"local:{model}?dtype={dtype}") as engine:
        for turn in range(repeats + 1):
            for i, way in enumerate(compared):
                start = time.perf_counter()
                outcome = await engine.run(way.spec, _text(prompt, turn, i), **_settings(way, tokens if turn else 4))
                seconds = time.perf_counter() - start
                if turn and seconds < best[i]["seconds"]:
                    best[i] = {
                        "seconds": seconds,
                        "tokens": outcome.usage.sampled_tokens,
                        "path": outcome.usage.critical_path_tokens,
                        "resamplings": sum("ancestors" in node.notes for node in outcome.graph.nodes),
                    }
    return best


async def _peak(model: str, dtype: str, way: Way, prompt: int, tokens: int) -> int:
    import orchestra

    async with orchestra.connect(f"local:{model}?dtype={dtype}") as engine:
        await engine.run(way.spec, _text(prompt, 1, 0), **_settings(way, tokens))
        return engine.engine.load().peak_bytes


def _settings(way: Way, tokens: int) -> dict[str, Any]:
    return {"max_tokens": tokens, "ignore_eos": True, **way.settings}


def _text(prompt: int, turn: int, i: int) -> str:
    """No prompt twice: none may be found in a cache."""
    if not prompt:
        return f"numbers: {turn + 20} {i + 30} 7 48 target: 55"
    return f"{turn} {i} ".ljust(prompt, "x")
