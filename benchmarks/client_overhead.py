"""What clients cost: Orchestra's engines beside a bare aiohttp loop, its-hub and OpenAI's client.

    python benchmarks/client_overhead.py [--its-hub-python PATH] [--json FILE] > benchmarks/results/client_overhead.md

A fake server (`latency_server.py`) in a process of its own answers each generation after 205 ms, however many run, so
all beyond that is the client or the machine. Each client (`overhead_clients.py`) has a fresh process of its own, and
one repetition is 256 completions at once of a prompt of 500 tokens (2,000 in the last group). Measured are the wall
time of the repetition and the CPU time of the client's process (`time.process_time`, all its threads). Not measured:
imports, connecting, and a first repetition, which warms up connection pools and caches.

Rows are compared with the bare loop of the same group, which sends what costs least and does no more than
`session.post` and `json.loads`: one request each without streaming, one request with `n`, or an event for each of 100
tokens. Clients of a group take turns within each repetition (bare, ours, bare, ours, ...), so what else the machine
does meets all of them; the ratio is the median of the ratios of repetitions, other figures are medians with minimum and
maximum. The server's CPU time is told beside them: were it near the wall time, the server would be what is measured.
"events each" is how many a caller saw per completion: an engine may merge what arrives together.
A client that fails says why in its row. What a client asked the server for last is in the JSON file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import latency_server

CLIENTS = Path(__file__).with_name("overhead_clients.py")
PATIENCE = 180.0  # seconds for one line of a client

GROUPS: dict[str, dict[str, str]] = {
    "256 requests at once": {
        "bare": "bare aiohttp",
        "orchestra": "Orchestra sglang://?n=off, `self_consistency(samples=256)`",
    },
    "one request with n = 256": {
        "bare_n": "bare aiohttp",
        "orchestra_n": "Orchestra sglang://, `self_consistency(samples=256)`",
    },
    "256 streams, 100 events each": {
        "bare_stream": "bare aiohttp",
        "orchestra_stream": "Orchestra sglang://?n=off&interval=1, `connection.stream(...)`",
    },
    "256 chat completions at once": {
        "bare_chat": "bare aiohttp",
        "its_hub": "self-consistency of its-hub",
        "openai": "AsyncOpenAI (httpx) of openai",
        "orchestra_openai": "Orchestra openai://?n=off, `self_consistency(samples=256)`",
        "orchestra_openai_n": "Orchestra openai://, `self_consistency(samples=256)`",
    },
    "2,000 requests at once": {
        "bare_runs": "bare aiohttp",
        "orchestra_runs": "Orchestra sglang://, 2,000 runs of `sample`",
    },
}

COLUMNS = ["", "wall, ms", "CPU, s per 1000", "wall ratio", "CPU ratio", "server CPU", "events each", "errors"]


class Client:
    """A client's process, and what it measured."""

    def __init__(self, name: str, python: str | None) -> None:
        self.name = name
        self.python = python
        self.results: list[dict[str, float]] = []
        self.error: str | None = None if python else "no environment with it was given"
        self.sent: dict[str, Any] = {}
        self.version = ""
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, port: int) -> None:
        """Start and warm up."""
        if self.python is None:
            return
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            self.python, CLIENTS, self.name, str(port), stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
        self.version = ((await self._line()) or {}).get("version", "")

    async def repeat(self, port: int) -> None:
        """One repetition, if nothing has failed so far."""
        if self.error is not None or self._process is None or self._process.stdin is None:
            return
        before = counters(port)
        self._process.stdin.write(b"go\n")
        if (result := await self._line()) is not None:
            after = counters(port)
            self.sent = sent(after["last"])
            self.results.append({**result, "server_cpu": after["cpu_seconds"] - before["cpu_seconds"]})

    async def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._process.returncode is None:
            if self._process.stdin is not None:
                self._process.stdin.close()
            try:
                await asyncio.wait_for(self._process.wait(), 5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _line(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        except TimeoutError:
            self.error = f"no answer within {PATIENCE:.0f} s"
            self._process.kill()
            return None
        answer: dict[str, Any] = json.loads(line or b'{"error": "the process ended"}')
        self.error = answer.get("error")
        return None if self.error else answer

    def values(self, key: str) -> list[float]:
        """One measurement of all repetitions: wall seconds, or CPU seconds per 1000 completions."""
        return [result[key] / (1 if key == "wall" else result["completions"] / 1000) for result in self.results]

    def ratio(self, bare: Client, key: str) -> float | None:
        """Median over repetitions of this client's figure by that of the bare one."""
        pairs = list(zip(self.values(key), bare.values(key), strict=False))
        return statistics.median(ours / theirs for ours, theirs in pairs) if pairs else None


def counters(port: int) -> dict[str, Any]:
    """What the server says of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/fake/counters", timeout=30) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def sent(last: dict[str, Any]) -> dict[str, Any]:
    """The last request, with its prompt by length."""
    body = dict(last.get("body") or {})
    for key in ("input_ids", "text", "prompt", "messages"):
        if key in body:
            body[key] = f"<{len(json.dumps(body[key]))} bytes>"
    return {"path": last.get("path"), "bytes": last.get("bytes"), "body": body}


def spread(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """Median (minimum..maximum)."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:,.{digits}f} ({low:,.{digits}f}..{high:,.{digits}f})"


def row(client: Client, bare: Client, title: str) -> str:
    """A client's line of the table."""
    if client.error is not None:
        return f"| {title} | {client.error.replace('|', '/')} {'| ' * (len(COLUMNS) - 1)}"
    errors = sum(int(result["errors"]) for result in client.results)
    events = statistics.median(result["events"] / result["completions"] for result in client.results)
    ratios = [client.ratio(bare, key) for key in ("wall", "cpu")]
    shown = ["-" if r is None or client is bare else f"{r:.2f}" for r in ratios]
    return (
        f"| {title} | {spread(client.values('wall'), 0, 1000)} | {spread(client.values('cpu'), 3)} "
        f"| {shown[0]} | {shown[1]} | {statistics.median(client.values('server_cpu')):.3f} "
        f"| {f'{events:.0f}' if events else '-'} | {errors} |"
    )


async def measure(port: int, names: Sequence[str], repeats: int, pythons: dict[str, str | None]) -> list[Client]:
    """A group: start its clients, let them take turns."""
    clients = [Client(name, pythons.get(name, sys.executable)) for name in names]
    try:
        for client in clients:
            await client.start(port)
        for _ in range(repeats):
            for client in clients:
                await client.repeat(port)
    finally:
        for client in clients:
            await client.stop()
    return clients


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(), "load": [os.getloadavg()[0]]}


async def main() -> None:
    """Measure all groups, print the table, write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", metavar="CLIENT", help="bare rows are always measured with them")
    parser.add_argument("--its-hub-python", metavar="PATH", help="a Python that has its-hub[lm]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    facts, pythons = machine(), {"its_hub": options.its_hub_python}
    print("| " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * (len(COLUMNS) - 1) + "|")
    measured: dict[str, Any] = {}
    with latency_server.running() as port:
        for group, titles in GROUPS.items():
            bare, *others = titles
            chosen = others if options.only is None else [name for name in others if name in options.only]
            if options.only is not None and bare not in options.only and not chosen:
                continue
            clients = await measure(port, [bare, *chosen], options.repeats, pythons)
            print(f"| **{group}** {'| ' * len(COLUMNS)}")
            for client in clients:
                print(row(client, clients[0], f"{titles[client.name]} {client.version}".rstrip()), flush=True)
                kept = {"group": group, "error": client.error, "sent": client.sent, "repetitions": client.results}
                measured[client.name] = kept
    facts["load"].append(os.getloadavg()[0])
    print(
        f"\nMedian (minimum..maximum) of {options.repeats} repetitions; ratios are to the bare loop of the group. "
        "The server is fake and takes 205 ms for each completion.\n"
        f"{facts['cpu']}, {facts['cores']} cores, Python {facts['python']}, load average {facts['load'][0]:.1f} before "
        f"and {facts['load'][1]:.1f} after; one command: `python benchmarks/client_overhead.py`."
    )
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "clients": measured}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
