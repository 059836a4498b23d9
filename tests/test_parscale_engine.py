"""ParScale streams in the in-process engine give what dense forwards of each stream, mixed by hand, give."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stream_folders import PREFIX, Dense, write

import orchestra
from orchestra.errors import CapabilityError, EngineError, UsageError
from orchestra.graph import Edge, ThreadGraph
from orchestra.runtime.engine import Load, Sampling
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.local.model import load_model
from orchestra.runtime.local.sources import Source
from orchestra.runtime.local.streams import variants
from orchestra.testing import (
    check_conservation,
    check_greedy,
    check_no_leak,
    check_parity,
    check_schedule_invariance,
    random_graph,
)
from orchestra.testing.graphs import generate
from orchestra.testing.laws import row_logits

ODD = {"debug": True, "copy_bytes": 0, "prefill": 3, "max_batch": 2, "kernel": "reference"}
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@asynccontextmanager
async def opened(folder: str, **options):
    engine = LocalEngine(folder, **options)
    try:
        yield await engine.open()
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    """`checkpoint(streams, kind)` gives `(folder, oracle)` of a tiny ParScale model."""
    made = {}

    def make(streams: int, kind: str = "llama", **options) -> tuple[str, Dense]:
        key = f"{streams} {kind} {sorted(options.items())}"
        if key not in made:
            backbone = make_model(kind, **options)
            folder = write(tmp_path_factory.mktemp("parscale") / f"P{streams}", backbone, streams)
            made[key] = folder, Dense(backbone, folder)
        return made[key]

    return make


@pytest.fixture(scope="module")
def sets(tiny, tmp_path_factory):
    """Folders with the streams of P = 2 and P = 4 on the tiny Llama, and nothing else."""
    place = tmp_path_factory.mktemp("sets")
    return [write(place / f"P{streams}", tiny, streams, whole=False) for streams in (2, 4)]


def parity(folder: str, model: Dense, seeds, **options) -> float:
    async def main() -> float:
        async with opened(folder, **options) as engine:
            worst = 0.0
            for seed in seeds:
                graph = await random_graph(engine, seed)
                worst = max(worst, await check_parity(engine, graph, model))
                await engine.release(graph)
            return worst

    return asyncio.run(main())


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("forward", ["auto", "transformers"])
def test_log_probabilities_are_those_of_the_dense_forward_of_each_stream(checkpoint, kind, forward):
    folder, dense = checkpoint(4, kind)
    parity(folder, dense, [1, 2], forward=forward)


@pytest.mark.parametrize("streams", [2, 8])
def test_any_number_of_streams_and_as_many_key_heads_as_heads(checkpoint, streams):
    folder, dense = checkpoint(streams, key_heads=4)
    parity(folder, dense, [3], **ODD)


@given(st.integers(0, 10**6))
@few
def test_parity(checkpoint, seed):
    folder, dense = checkpoint(2)
    parity(folder, dense, [seed])
    parity(folder, dense, [seed], **ODD)


@pytest.mark.slow
@given(st.integers(0, 10**6))
@many
def test_parity_at_depth(checkpoint, seed):
    folder, dense = checkpoint(2)
    parity(folder, dense, [seed])
    parity(folder, dense, [seed], **ODD)
