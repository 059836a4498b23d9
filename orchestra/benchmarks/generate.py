"""End to end: many continuations of one prompt, ours beside transformers and SGLang on the same work.

Each runner has a process of its own (`runners`), one after the other. Where several numbers of threads are given, every
runner is measured with each of them and the best counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from typing import Any

from orchestra.benchmarks.report import Column
from orchestra.benchmarks.runners import NEVER_SHARED, Done, Work

PEERS = ("transformers", "sglang")

COLUMNS = (
    Column("runner", "runner"),
    Column("work", "prompt x samples x tokens"),
    Column("threads", "threads"),
    Column("rate", "tokens/s", ",.1f"),
    Column("decode_rate", "decoding, tokens/s", ",.1f"),
    Column("first", "to first tokens, s", ",.2f"),
    Column("gigabytes", "peak, GB", ".2f"),
    Column("ratio", "ours is", ".2f"),
    Column("decode_ratio", "ours decodes", ".2f"),
)
NOTES = (
    "`decoding` leaves out the time until all samples have their first token, and those tokens. `ours is` and "
    "`ours decodes` are our rates over the row's, each at its best number of threads. The peak is of resident memory, "
    "model included."
)


@dataclass(frozen=True, slots=True)
class Way:
    """A runner with a name for its rows, and the works that it does."""

    name: str
    runner: str
    works: Sequence[Work]


def samples(
    model: str, dtype: str, samples: Sequence[int], prompt: int, tokens: int, peers: Sequence[str]
) -> list[Way]:
    """Ours and the peers, for several numbers of samples."""
    works = [Work(model, dtype, n, prompt, tokens, seed=i + 1) for i, n in enumerate(sorted(samples))]
    return [Way("ours", "ours", works), *(Way(peer, peer, works) for peer in peers)]


def prefixes(model: str, dtype: str, samples: int, prompts: Sequence[int], tokens: int) -> list[Way]:
    """Ours beside the same engine with keys and values replicated for each sample, for several prompt lengths."""
    works = [Work(model, dtype, samples, n, tokens, seed=i + 1) for i, n in enumerate(sorted(prompts))]
    replicated = [replace(work, copy_bytes=NEVER_SHARED) for work in works]
    return [Way("ours", "ours", works), Way("replicated", "ours", replicated)]


def tree(
    model: str,
    dtype: str,
    samples: int,
    branches: Sequence[int],
    prompt: int,
    second: int,
    tokens: int,
    token_bytes: int,
) -> list[Way]:
    """Two levels of prompts: ours with both shared, with the first only, with none.

    Args:
        model: a folder.
        dtype: of the model.
        samples: of each second-level prompt.
        branches: numbers of second-level prompts.
        prompt: tokens of the first level.
        second: of the second.
        tokens: of each sample.
        token_bytes: bytes of the keys and values of a token in one layer.
    """
    works = [Work(model, dtype, samples, prompt, tokens, n, second, seed=i + 1) for i, n in enumerate(sorted(branches))]
    # The rule copies what has few readers: all copies of a second level, but not those of the first, are below it.
    one = [replace(work, copy_bytes=samples * second * token_bytes) for work in works]
    none = [replace(work, copy_bytes=NEVER_SHARED) for work in works]
    return [Way("both levels shared", "ours", works), Way("first level", "ours", one), Way("replicated", "ours", none)]


def rows(ways: Sequence[Way], threads: Sequence[int], repeats: int) -> Iterator[dict[str, Any]]:
    """Measure; the first way is what the others are compared with. See `COLUMNS`."""
    best: list[dict[str, Any]] = []
    for way in ways:
        tried: list[dict[str, Any]] = []
        for n in threads:
            if way.runner == "sglang" and find_spec("sglang") is None:
                tried.append({"error": "not installed"})
                continue
            tried += asyncio.run(_measure(way, n, repeats))
        for i, work in enumerate(way.works):
            done = [one for one in tried if one.get("index") == i]
            row: dict[str, Any] = {"runner": way.name, "work": _said(work), **asdict(work), "tried": done}
            del row["model"]
            if not done:
                errors = [one["error"] for one in tried if "error" in one]
                yield {**row, "runner": f"{way.name}: {errors[0] if errors else 'no answer'}"}
                continue
            top = max(done, key=lambda one: float(one["rate"]))
            row |= top | {"decode_rate": max(one["decode_rate"] for one in done)}
            if way is ways[0]:
                best.append(row)
            elif i < len(best):
                row |= {key: best[i][other] / row[other] for key, other in RATIOS if row[other]}
            yield row


RATIOS = (("ratio", "rate"), ("decode_ratio", "decode_rate"))


def _said(work: Work) -> str:
    tree = f" + {work.branches} x {work.second:,}" if work.second else ""
    return f"{work.prompt:,}{tree} x {work.threads} x {work.tokens}"


async def _measure(way: Way, threads: int, repeats: int) -> list[dict[str, Any]]:
    """All works of a runner in one process: the fastest of the repeats of each, or the error that ended it."""
    works = [replace(w, seed=w.seed + 1000 * k + 100_000 * threads) for k in range(repeats) for w in way.works]
    found: dict[int, dict[str, Any]] = {}
    count = 0
    async for answer in _answers(way.runner, works, threads):
        if "error" in answer:
            return [*found.values(), answer]
        done = Done(**answer)
        later = max(done.seconds - done.first, 1e-9)
        index = count % len(way.works)
        row = {
            "index": index,
            "threads": threads,
            "rate": done.tokens / done.seconds,
            "decode_rate": (done.tokens - works[count].threads) / later,
            "first": done.first,
            "seconds": done.seconds,
            "gigabytes": done.memory / 1e9,
        }
        if index not in found or row["rate"] > found[index]["rate"]:
            found[index] = row
        count += 1
    return list(found.values())


async def _answers(runner: str, works: list[Work], threads: int) -> AsyncIterator[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "orchestra.benchmarks.runners",
        runner,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps([asdict(work) for work in works]).encode())
        process.stdin.close()
        async for line in process.stdout:
            yield json.loads(line)
        if code := await process.wait():
            yield {"error": f"its process ended with code {code}"}
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
