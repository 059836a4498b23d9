"""Workers in one concurrent cache beside as many independent threads, on one engine: tokens a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

from orchestra.benchmarks.report import Column

LAYOUTS = ("combined", "interleaved", "contiguous")

COLUMNS = (
    Column("way", "way"),
    Column("tokens", "sampled tokens", ","),
    Column("seconds", "seconds", ",.2f"),
    Column("rate", "tokens/s", ",.1f"),
    Column("ratio", "of independent threads", ".2f"),
)
NOTES = (
    "All ways take turns on one engine; the fastest run of each counts. Independent threads are `self_consistency` "
    "with as many samples; workers do not explain the setting, check for redundant work or ask for an answer."
)


def rows(model: str, dtype: str, workers: int, prompt: int, tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Measure independent threads, then each layout.

    Args:
        model: a folder; its tokenizer must know any text.
        dtype: of the model.
        workers: how many, and how many threads.
        prompt: letters of the prompt.
        tokens: most that a worker samples.
        repeats: rounds; a first one is not counted.
    """
    settings = f"max_tokens={tokens}, step_tokens={tokens}, instruct=False, check_every=0, finish=''"
    ways = {"independent threads": f"self_consistency(samples={workers})"}
    ways |= {layout: f"hogwild(workers={workers}, layout='{layout}', {settings})" for layout in LAYOUTS}
    best = asyncio.run(_measure(model, dtype, list(ways.values()), prompt, tokens, repeats))
    for (way, spec), (seconds, sampled) in zip(ways.items(), best, strict=True):
        rate, alone = sampled / seconds, best[0][1] / best[0][0]
        shown = way if way == "independent threads" else f"hogwild, {way}"
        ratio = None if way == "independent threads" else rate / alone
        yield {"way": shown, "spec": spec, "tokens": sampled, "seconds": seconds, "rate": rate, "ratio": ratio}


async def _measure(
    model: str, dtype: str, specs: Sequence[str], prompt: int, tokens: int, repeats: int
) -> list[tuple[float, int]]:
    """The fastest `(seconds, sampled tokens)` of each, by rate."""
    import orchestra

    best = [(1.0, 0)] * len(specs)
    async with orchestra.connect(f"local:{model}?dtype={dtype}") as engine:
        for turn in range(repeats + 1):
            for i, spec in enumerate(specs):
                text = f"{turn} {i} ".ljust(prompt, "x")  # no prompt twice: none may be found in a cache
                most = tokens if turn else 4
                start = time.perf_counter()
                outcome = await engine.run(spec, text, seed=turn, temperature=1.0, max_tokens=most)
                seconds, sampled = time.perf_counter() - start, outcome.usage.sampled_tokens
                if turn and sampled / seconds > best[i][1] / best[i][0]:
                    best[i] = seconds, sampled
    return best
