"""Who generates: each a process of its own, with its own threads and its own peak of memory.

    python -m orchestra.benchmarks.runners NAME      works on standard input, one answer a line

A work is `samples` continuations of one prompt of random ids, all of the same length. The works of a process differ in
numbers only, not in model or type, and none has a prompt in common with another. Before the first of them each runner
does a small one that nobody counts.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestra.graph import Origin
    from orchestra.runtime.engine import Engine

NEVER_SHARED = 1 << 60  # copy_bytes with which every reader has its own copy of everything


@dataclass(frozen=True, slots=True)
class Work:
    """What to generate.

    Attributes:
        model: a folder.
        dtype: `float32` or `bfloat16`.
        samples: continuations of each prompt.
        prompt: tokens that all share.
        tokens: of each continuation.
        branches, second: with `second` above 0 the prompt forks into so many prompts of so many further tokens.
        copy_bytes: of the engine; None for its default.
        seed: of the prompt and of what is sampled.
    """

    model: str
    dtype: str
    samples: int
    prompt: int
    tokens: int
    branches: int = 1
    second: int = 0
    copy_bytes: int | None = None
    seed: int = 0

    @property
    def threads(self) -> int:
        """Continuations in all."""
        return self.samples * self.branches

    def ids(self, vocabulary: int, count: int, which: int = 0) -> list[int]:
        """Random token ids; the first five of a vocabulary are often special ones."""
        import numpy as np

        found: list[int] = np.random.default_rng((self.seed, which)).integers(5, vocabulary, count).tolist()
        return found


@dataclass(frozen=True, slots=True)
class Done:
    """What it took.

    Attributes:
        seconds: from the request to the last token.
        first: from the request until every continuation has its first token.
        tokens: sampled.
        memory: peak resident bytes so far of the process, or of the server's processes.
    """

    seconds: float
    first: float
    tokens: int
    memory: int


Answers = Iterator[Done]


def ours(works: list[Work]) -> Answers:
    """The in-process engine: forks of one prompt."""
    from orchestra.runtime.attention.cost import COPY_BYTES
    from orchestra.runtime.local.engine import LocalEngine

    most = max(work.threads for work in works)
    copies = COPY_BYTES if works[0].copy_bytes is None else works[0].copy_bytes
    engine = LocalEngine(works[0].model, dtype=works[0].dtype, max_batch=most, copy_bytes=copies)
    with asyncio.Runner() as runner:
        for work in _warmed(works):
            yield runner.run(_fork(engine, work))
        runner.run(engine.close())


async def _fork(engine: Engine, work: Work) -> Done:
    from orchestra.graph import Edge, Node, Span, ThreadGraph
    from orchestra.runtime.engine import Sampling
    from orchestra.testing.graphs import generate

    await engine.encode("")  # opens it
    graph, size = ThreadGraph(), _vocabulary(work.model)

    def prompt(parents: list[Node], tokens: int, which: int) -> Node:
        origin: Origin = "forced" if parents else "prompt"
        span = Span(origin, work.ids(size, tokens, which), tokens)
        return graph.add([Edge(parent.id, len(parent)) for parent in parents], spans=[span])

    prompts = [prompt([], work.prompt, 0)]
    if work.second:
        prompts = [prompt(prompts, work.second, i + 1) for i in range(work.branches)]
    nodes = [graph.add([Edge(p.id, len(p))], path=[i, j]) for i, p in enumerate(prompts) for j in range(work.samples)]
    sampling = Sampling(temperature=1.0, max_tokens=work.tokens, ignore_eos=True)
    before, start = engine.load().sampled_tokens, time.perf_counter()
    asked = [generate(engine, graph, node, sampling, seed=work.seed, chunk=0) for node in nodes]
    tasks = [asyncio.create_task(one) for one in asked]

    def waiting() -> bool:
        return engine.load().sampled_tokens - before < len(nodes) and not all(task.done() for task in tasks)

    while waiting():  # noqa: ASYNC110 (the engine tells nobody when a counter moves)
        await asyncio.sleep(0.002)
    first = time.perf_counter() - start
    sampled = sum([(await task).count for task in tasks])
    seconds = time.perf_counter() - start
    await engine.release(graph)
    return Done(seconds, first, sampled, _peak())


def transformers(works: list[Work]) -> Answers:
    """`model.generate` on a batch of equal prompts, with scaled dot product attention."""
    import torch

    from orchestra.runtime.local.model import load_plain

    torch.manual_seed(0)
    module = load_plain(works[0].model, works[0].dtype)
    module.generation_config.eos_token_id = None
    for work in _warmed(works):
        ids = torch.tensor([work.ids(module.config.vocab_size, work.prompt)] * work.samples)
        clock = _Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            found = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                max_new_tokens=work.tokens,
                pad_token_id=0,
                streamer=clock,
            )
        seconds = time.perf_counter() - start
        sampled = found.shape[1] * work.samples - ids.numel()
        yield Done(seconds, clock.puts[1] - start, sampled, _peak())


class _Clock:
    """Notes when tokens come: the prompt is the first `put`, then there is one for each step."""

    def __init__(self) -> None:
        self.puts: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.puts.append(time.perf_counter())

    def end(self) -> None:
        pass


def sglang(works: list[Work]) -> Answers:
    """An SGLang server on this machine: one request with `n` samples, streamed, so that its radix cache shares it."""
    from orchestra.runtime.sglang_server import SGLangServer

    most = max(2 * (work.prompt + work.threads * (work.tokens + work.prompt // 8)) for work in works) + 8192
    flags = {"device": "cpu", "dtype": works[0].dtype, "max_total_tokens": str(most)}
    with tempfile.TemporaryDirectory() as folder, asyncio.Runner() as runner:
        server = SGLangServer(works[0].model, flags=flags, log=Path(folder) / "server.log")
        server.start()
        try:
            runner.run(server.ready())
            assert server.process is not None
            for work in _warmed(works):
                yield replace(runner.run(_ask(server.port, work)), memory=_family_peak(server.process.pid))
        finally:
            server.stop()


async def _ask(port: int, work: Work) -> Done:
    import aiohttp

    body = {
        "input_ids": work.ids(_vocabulary(work.model), work.prompt),
        "stream": True,
        "stream_interval": 16,
        "sampling_params": {
            "temperature": 1.0,
            "max_new_tokens": work.tokens,
            "ignore_eos": True,
            "n": work.samples,
        },
    }
    counts: dict[int, int] = {}
    first = 0.0
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 20) as session:
        start = time.perf_counter()
        async with session.post(f"http://127.0.0.1:{port}/generate", json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    counts[event.get("index", 0)] = event["meta_info"]["completion_tokens"]
                    if len(counts) == work.samples and not first:
                        first = time.perf_counter() - start
        return Done(time.perf_counter() - start, first, sum(counts.values()), 0)


RUNNERS: dict[str, Callable[[list[Work]], Answers]] = {"ours": ours, "transformers": transformers, "sglang": sglang}


def _warmed(works: list[Work]) -> Iterator[Work]:
    """The works, after one answer that `main` throws away."""
    small = replace(works[0], samples=min(works[0].samples, 2), prompt=8, tokens=4, second=min(works[0].second, 4))
    yield replace(small, seed=1 << 20)
    yield from works


def _vocabulary(model: str) -> int:
    return int(json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _family_peak(leader: int) -> int:
    """Peak resident bytes of a process group, each process by itself."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            if os.getpgid(int(status.parent.name)) == leader:
                lines = status.read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, ValueError):
            continue  # it has just ended
    return total


def main() -> None:
    """Do the works of standard input; answers or one error on standard output, a line each."""
    works = [Work(**fields) for fields in json.load(sys.stdin)]
    out, sys.stdout = sys.stdout, sys.stderr
    try:
        for i, done in enumerate(RUNNERS[sys.argv[1]](works)):
            if i:
                print(json.dumps(asdict(done)), file=out, flush=True)
    except Exception as error:
        print(
            json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}), file=out, flush=True
        )


if __name__ == "__main__":
    main()
