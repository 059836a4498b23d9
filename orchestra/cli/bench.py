"""`orchestra bench`: speed, with the peers beside it in one run."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra.cli import options
from orchestra.errors import UsageError
from orchestra.extras import require

if TYPE_CHECKING:
    import torch

    from orchestra.benchmarks.report import Report

app = typer.Typer(help="Measure speed, with the peers beside it in one run.", no_args_is_help=True)

Out = Annotated[
    Path | None, typer.Option(metavar="FILE.json", help="Write all figures, and the table beside it as .md.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch.", show_default="as many as cores")]
Device = Annotated[str, typer.Option(help="A torch device.")]
Shape = Annotated[str, typer.Option(help="qwen2.5-0.5b-shape (random weights), or a folder.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Of a shape, instead of its own.", show_default=False)]
Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; the fastest of each way counts.")]


@app.callback()
def _group() -> None:
    pass


def _show(report: Report, rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    """Print rows as they come, as one table; keep what there is in `out`."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    with Live(report.table(), console=console, auto_refresh=False, vertical_overflow="visible") as live:
        for row in rows:
            report.rows.append(row)
            live.update(report.table(), refresh=True)
            if out is not None:
                report.save(out)
    console.print(f"[dim]{report.notes}[/dim]")


def _begin(out: Path | None, threads: int | None, device: str = "cpu") -> torch.device:
    """Check what can be checked before the work."""
    require("torch", "transformers", what="measuring the in-process engine", extra="local")
    if out is not None:
        options.check_writable(out)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    return target


def _numbers(text: str, name: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"--{name} is one or more numbers above 0, as in 8,32, not {text!r}")
    return found


@app.command()
def attention(
    readers: Annotated[str, typer.Option(metavar="N,...", help="Readers of the prefix.")] = "64",
    prefix: Annotated[str, typer.Option(metavar="N,...", help="Tokens of the prefix.")] = "4096",
    grid: Annotated[bool, typer.Option("--grid", help="8 to 256 readers of 16 to 16,384 tokens.")] = False,
    tails: Annotated[int, typer.Option(min=1, help="Tokens that each reader has of its own.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    key_heads: Annotated[int, typer.Option(min=1, help="Heads of keys and values.")] = 8,
    dim: Annotated[int, typer.Option(min=1, help="Of a head.")] = 128,
    dtype: Annotated[str, typer.Option(metavar="NAME,...", help="Of keys and values.")] = "float32,bfloat16",
    device: Device = "cpu",
    threads: Threads = None,
    max_bytes: Annotated[float, typer.Option(help="Skip cases whose replicated keys and values are larger.")] = 8e9,
    seconds: Annotated[float, typer.Option(min=0, help="How long each way of a case is repeated.")] = 0.5,
    out: Out = None,
) -> None:
    """One layer of decode attention over a shared prefix, beside PyTorch's over replicated keys and values.

    On a large card: --device cuda --dtype bfloat16 --readers 256 --prefix 16384 --max-bytes 64e9
    """
    target = _begin(out, threads, device)
    from orchestra.benchmarks import attention as bench
    from orchestra.benchmarks.machine import machine
    from orchestra.benchmarks.report import Report
    from orchestra.runtime.local.model import DTYPES

    names = dtype.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise UsageError(f"unknown dtype {unknown[0]!r} (known: {', '.join(DTYPES)})")
    if heads % key_heads:
        raise UsageError(f"--heads is a multiple of --key-heads, not {heads} of {key_heads}")
    cases = bench.grid(
        bench.READERS if grid else _numbers(readers, "readers"),
        bench.PREFIXES if grid else _numbers(prefix, "prefix"),
        tuple(DTYPES[name] for name in names),
        tails=tails,
        heads=heads,
        key_heads=key_heads,
        dim=dim,
        max_bytes=max_bytes,
    )
    if not cases:
        raise UsageError("every case has more replicated keys and values than --max-bytes allows")
    title = f"Decode attention: one layer, {heads}/{key_heads} heads of {dim}, tails of {tails} tokens"
    report = Report(title, bench.COLUMNS, machine(target), bench.NOTES)
    _show(report, bench.rows(cases, target, seconds=seconds), out)


class Table(StrEnum):
    """The tables of `bench generate`."""

    SAMPLES = "samples"
    PREFIXES = "prefixes"
    TREE = "tree"


@app.command()
def generate(
    table: Annotated[
        Table,
        typer.Argument(
            help="samples: of one prompt, beside the peers. prefixes: longer and longer ones, shared and replicated. "
            "tree: two levels of prompts, both, one or none of them shared."
        ),
    ] = Table.SAMPLES,
    model: Annotated[str, typer.Option(help="demo, qwen2.5-0.5b-shape (random weights), or a folder.")] = "demo",
    layers: Layers = None,
    samples: Annotated[
        str | None, typer.Option(metavar="N,...", help="Continuations of a prompt.", show_default="1,8,32,128")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="N,...", help="Tokens of the prompt.", show_default="by table")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each continuation.")] = 64,
    branches: Annotated[str, typer.Option(metavar="N,...", help="Second-level prompts of the tree.")] = "4,8",
    second: Annotated[int, typer.Option(min=1, help="Tokens of a second-level prompt.")] = 512,
    dtype: Dtype = "float32",
    threads: Annotated[str, typer.Option(metavar="N,...", help="Try each; the best counts.")] = "1,2",
    peers: Annotated[str, typer.Option(metavar="NAME,...", help="Of the table of samples.")] = "transformers,sglang",
    repeats: Annotated[int, typer.Option(min=1, help="Of each work; the fastest counts.")] = 1,
    out: Out = None,
) -> None:
    """Many continuations of one prompt, from the request to the last token.

    Each runner has its process, the peers too. The works of the tables are set by --samples, --prompt and --tokens.
    """
    _begin(out, None)
    from orchestra.benchmarks import generate as bench
    from orchestra.benchmarks.machine import machine
    from orchestra.benchmarks.models import model_folder, token_bytes
    from orchestra.benchmarks.report import Report

    counts = _numbers(threads, "threads")
    many = _numbers(samples or {"samples": "1,8,32,128", "prefixes": "128", "tree": "16"}[table], "samples")
    prompts = _numbers(prompt or {"samples": "32", "prefixes": "1024,4096,16000", "tree": "4096"}[table], "prompt")
    others = [name for name in peers.split(",") if name]
    if unknown := [name for name in others if name not in bench.PEERS]:
        raise UsageError(f"unknown peer {unknown[0]!r} (known: {', '.join(bench.PEERS)})")
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"unknown dtype {dtype!r} (known: float32, bfloat16)")
    with model_folder(model, dtype, layers) as folder:
        if table is Table.SAMPLES:
            ways = bench.samples(folder, dtype, many, prompts[0], tokens, others)
        elif table is Table.PREFIXES:
            ways = bench.prefixes(folder, dtype, many[0], prompts, tokens)
        else:
            size = token_bytes(folder, dtype)
            ways = bench.tree(folder, dtype, many[0], _numbers(branches, "branches"), prompts[0], second, tokens, size)
        shown = model + (f", {layers} layers" if layers else "")
        facts = machine()
        del facts["threads"]  # every row says its own
        report = Report(f"End to end, {table}: {shown}, {dtype}", bench.COLUMNS, facts, bench.NOTES)
        _show(report, bench.rows(ways, counts, repeats), out)


@app.command()
def hogwild(
    model: Shape = "qwen2.5-0.5b-shape",
    layers: Layers = None,
    workers: Annotated[int, typer.Option(min=2, max=8, help="How many.")] = 4,
    prompt: Annotated[int, typer.Option(min=8, help="Letters of the prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=4, help="Of each worker.")] = 64,
    dtype: Dtype = "float32",
    threads: Threads = None,
    repeats: Rounds = 3,
    out: Out = None,
) -> None:
    """Workers in one concurrent cache, beside as many independent threads on the same engine."""
    _begin(out, threads)
    from orchestra.benchmarks import hogwild as bench
    from orchestra.benchmarks.machine import machine
    from orchestra.benchmarks.models import model_folder
    from orchestra.benchmarks.report import Report

    with model_folder(model, dtype, layers) as folder:
        shown = model + (f", {layers} layers" if layers else "")
        title = f"Hogwild: {workers} workers, {tokens} tokens each after {prompt} letters: {shown}, {dtype}"
        report = Report(title, bench.COLUMNS, machine(), bench.NOTES)
        _show(report, bench.rows(folder, dtype, workers, prompt, tokens, repeats), out)


@app.command()
def power(
    model: Annotated[
        str, typer.Option(help="demo, qwen2.5-0.5b-shape (random weights), or a folder.")
    ] = "qwen2.5-0.5b-shape",
    layers: Layers = None,
    particles: Annotated[int, typer.Option(min=2, help="How many.")] = 64,
    prompt: Annotated[str, typer.Option(metavar="N,...", help="Letters of the prompt.")] = "64",
    tokens: Annotated[int, typer.Option(min=4, help="Of each text.")] = 64,
    every: Annotated[int, typer.Option(min=1, help="Tokens between two forced resamplings.")] = 16,
    alpha: Annotated[float, typer.Option(min=1, help="The exponent.")] = 4.0,
    moves: Annotated[int, typer.Option(min=0, help="Of power_mh, in each of 16 blocks; 0 leaves it out.")] = 0,
    dtype: Dtype = "float32",
    threads: Threads = None,
    repeats: Rounds = 3,
    out: Out = None,
) -> None:
    """Power-SMC beside as many plain samples on the same engine, and beside one; what resampling costs."""
    _begin(out, threads)
    from orchestra.benchmarks import power as bench
    from orchestra.benchmarks.machine import machine
    from orchestra.benchmarks.models import model_folder
    from orchestra.benchmarks.report import Report

    prompts = (0,) if model == "demo" else _numbers(prompt, "prompt")
    compared = bench.ways(particles, every, alpha, moves)
    with model_folder(model, dtype, layers) as folder:
        shown = model + (f", {layers} layers" if layers else "")
        title = f"Power sampling: {particles} particles of {tokens} tokens: {shown}, {dtype}"
        report = Report(title, bench.COLUMNS, machine(), bench.NOTES)
        _show(report, bench.rows(folder, dtype, compared, prompts, tokens, repeats), out)


@app.command()
def streams(
    model: Shape = "qwen2.5-0.5b-shape",
    layers: Layers = None,
    streams: Annotated[str, typer.Option(metavar="P,...", help="Numbers of streams above 1.")] = "2,4,8",
    prompt: Annotated[int, typer.Option(min=8, help="Letters of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Of a sequence.")] = 32,
    dtype: Dtype = "float32",
    threads: Annotated[str, typer.Option(metavar="N,...", help="Of PyTorch; each is tried.")] = "1,2",
    repeats: Rounds = 3,
    out: Out = None,
) -> None:
    """One sequence in several learned streams (ParScale), beside one stream and as many separate sequences."""
    _begin(out, None)
    from orchestra.benchmarks import streams as bench
    from orchestra.benchmarks.machine import machine
    from orchestra.benchmarks.models import model_folder
    from orchestra.benchmarks.report import Report

    counts, tried = _numbers(streams, "streams"), _numbers(threads, "threads")
    if min(counts) < 2:
        raise UsageError(f"--streams is one or more numbers above 1, as in 2,8, not {streams!r}")
    with model_folder(model, dtype, layers) as folder:
        shown = model + (f", {layers} layers" if layers else "")
        title = f"Streams: {tokens} tokens after {prompt} letters: {shown}, {dtype}"
        facts = machine()
        del facts["threads"]  # every row says its own
        report = Report(title, bench.COLUMNS, facts, bench.NOTES)
        _show(report, bench.rows(folder, dtype, counts, prompt, tokens, tried, repeats), out)


@app.command()
def client(
    samples: Annotated[int, typer.Option(min=1, help="Completions at once.")] = 256,
    milliseconds: Annotated[float, typer.Option(min=0, help="The server takes for each.")] = 205.0,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions that count.")] = 7,
    out: Out = None,
) -> None:
    """What our client costs beside a bare aiohttp loop, on a server that only waits."""
    if out is not None:
        options.check_writable(out)
    from orchestra.benchmarks import client as bench
    from orchestra.benchmarks.report import Report, processor

    report = Report(f"Client: {samples} completions at once", bench.COLUMNS, processor(), bench.NOTES)
    _show(report, bench.rows(samples, milliseconds, repeats), out)
