"""One sequence in P streams, beside the same model without streams and P separate sequences: time and cache memory."""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from orchestra.benchmarks.report import Column
from orchestra.strategies import strategy
from orchestra.thread import Thread

if TYPE_CHECKING:
    from orchestra.api import Connection
    from orchestra.runtime.engine import Delta

PREFIX_TOKENS = 48  # of all published models

COLUMNS = (
    Column("threads", "threads"),
    Column("way", "way"),
    Column("milliseconds", "ms a token", ",.1f"),
    Column("ratio", "of one stream", ".2f"),
    Column("megabytes", "keys and values, MB", ",.1f"),
    Column("prefix_megabytes", "prefixes, MB", ",.1f"),
)
NOTES = (
    "Time from the first token to the last, by the tokens of a sequence; all ways take turns, those without streams on "
    "an engine that has none, and the fastest run of each counts. Keys and values are those that the engine holds when "
    "all is said; the prefixes are P x 48 tokens of them, learned, once for all sequences. Separate sequences have "
    "prompts of their own."
)


class Way(NamedTuple):
    """So many sequences in so many streams."""

    streams: int
    sequences: int

    def __str__(self) -> str:
        if self.sequences > 1:
            return f"{self.sequences} sequences"
        return "one stream" if self.streams == 1 else f"{self.streams} streams"


class Run(NamedTuple):
    """What one run of a way took: seconds a token, and bytes of keys and values at its end."""

    seconds: float
    bytes: int


def rows(
    model: str, dtype: str, streams: Sequence[int], prompt: int, tokens: int, threads: Sequence[int], repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure one stream, each number of streams, and as many separate sequences as the largest of them.

    Args:
        model: a folder; its tokenizer must know any text.
        dtype: of the model.
        streams: numbers above 1; random parameters are made for them.
        prompt: letters of the prompt.
        tokens: that each sequence samples.
        threads: of PyTorch; each is tried.
        repeats: rounds; a first one is not counted.
    """
    import torch

    ways = [Way(1, 1), *(Way(count, 1) for count in streams), Way(1, max(streams))]
    with _random_sets(model, streams) as folders:
        for count in threads:
            torch.set_num_threads(count)
            plain = f"local:{model}?dtype={dtype}"
            best = asyncio.run(_measure(plain, f"{plain}&streams={folders}", ways, prompt, tokens, repeats))
            for way, run in best.items():
                yield {
                    "threads": count,
                    "way": str(way),
                    "milliseconds": run.seconds * 1e3,
                    "ratio": None if way == ways[0] else run.seconds / best[ways[0]].seconds,
                    "megabytes": run.bytes / 1e6,
                    "prefix_megabytes": None if way.streams == 1 else way.streams * _prefix_bytes(model, dtype) / 1e6,
                }


async def _measure(
    plain: str, streamed: str, ways: Sequence[Way], prompt: int, tokens: int, repeats: int
) -> dict[Way, Run]:
    import orchestra

    best: dict[Way, Run] = {}
    async with orchestra.connect(plain) as one, orchestra.connect(streamed) as several:
        for turn in range(repeats + 1):
            for way in ways:
                run = await _once(one if way.streams == 1 else several, way, turn, prompt, tokens)
                if turn and (way not in best or run.seconds < best[way].seconds):
                    best[way] = run
    return best


async def _once(connection: Connection, way: Way, turn: int, prompt: int, tokens: int) -> Run:
    seen = [(time.perf_counter(), 0)]  # the start; then when tokens of the first sequence came, and how many
    held: list[int] = []

    @strategy
    async def timed(thread: Thread) -> Thread:
        def note(delta: Delta) -> bool:
            seen.append((time.perf_counter(), delta.count))
            return False

        texts = [f"{turn} {i} ".ljust(prompt, "x") for i in range(way.sequences)]  # no two begin alike
        first, *others = thread.spawn(texts)
        async with asyncio.TaskGroup() as group:
            for other in others:
                group.create_task(other.generate(watch=lambda delta: False))
            task = group.create_task(first.generate(watch=note))
        await asyncio.sleep(0.2)  # until the room for growing is given back
        held.append(connection.engine.load().cached_bytes)
        return task.result()

    await connection.run(
        timed(), "x", seed=turn, temperature=1.0, max_tokens=tokens, ignore_eos=True, streams=way.streams
    )
    began = seen[1:] if len(seen) > 2 else seen  # of a tiny model all may come at once: then from the start
    return Run((began[-1][0] - began[0][0]) / sum(count for _, count in began[1:]), held[0])


@contextmanager
def _random_sets(model: str, streams: Sequence[int]) -> Iterator[str]:
    """Folders, as a URL names them, with random streams for a model; removed afterwards."""
    import torch
    from safetensors.torch import save_file

    from orchestra.parscale.layout import prefix_names

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    hidden, layers = config["hidden_size"], range(config["num_hidden_layers"])
    heads, dim = _key_shape(config)
    with tempfile.TemporaryDirectory(prefix="orchestra-bench-") as place:
        folders = []
        for count in streams:
            prefixes = [*prefix_names(layers, "k"), *prefix_names(layers, "v")]
            tensors = {name: 0.02 * torch.randn(count, heads, PREFIX_TOKENS, dim) for name in prefixes}
            for part, shape in ((0, (hidden, hidden * count)), (2, (count, hidden))):
                tensors[f"model.aggregate_layer.{part}.weight"] = 0.02 * torch.randn(shape)
                tensors[f"model.aggregate_layer.{part}.bias"] = torch.zeros(shape[0])
            folder = Path(place) / f"P{count}"
            folder.mkdir()
            said = {"parscale_n": count, "parscale_n_tokens": PREFIX_TOKENS, "parscale_attn_smooth": 0.1}
            said["model_type"] = config["model_type"] + "_parscale"
            (folder / "config.json").write_text(json.dumps(config | said), encoding="utf-8")
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            folders.append(str(folder))
        yield ",".join(folders)


def _key_shape(config: dict[str, Any]) -> tuple[int, int]:
    """Key heads, and dimension of a head."""
    heads = config["num_attention_heads"]
    return config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads


def _prefix_bytes(model: str, dtype: str) -> int:
    """Bytes of the prefix of one stream in all layers."""
    from orchestra.benchmarks.models import token_bytes

    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return int(PREFIX_TOKENS * config["num_hidden_layers"] * token_bytes(model, dtype))
