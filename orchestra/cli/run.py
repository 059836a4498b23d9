"""`orchestra run`: one prompt under one strategy."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orchestra.cli import options
from orchestra.errors import OrchestraError, UsageError

if TYPE_CHECKING:
    from orchestra.outcome import Outcome, Usage
    from orchestra.runtime.engine import Prompt


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")],
    strategy: options.Strategy = "sample",
    engine: options.Engine = "demo",
    alias: options.Alias = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.", show_default=False)] = None,
    seed: options.Seed = 0,
    temperature: options.Temperature = None,
    top_p: options.TopP = 1.0,
    max_tokens: options.MaxTokens = None,
    json_schema: options.JsonSchema = None,
    regex: options.Regex = None,
    budget: options.Budget = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the outcome with its thread graph.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON, without its graph.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Show the threads as they grow.")] = False,
) -> None:
    """Run one prompt: prints the text, then what it cost."""
    from orchestra.spec import parse_budget, parse_strategy

    options.check_sampling(seed, temperature, top_p)
    if json and live:
        raise UsageError("choose one of --json and --live")
    engines = options.engines(alias)
    options.quiet(engine, *engines.values())
    if trace is not None:
        options.check_writable(trace)
    if prompt == "-":
        prompt = sys.stdin.read()
    messages: Prompt = prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    settings: dict[str, Any] = {
        "seed": seed,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "json_schema": options.read_schema(json_schema),
        "regex": regex,
        "budget": parse_budget(budget) if budget else None,
    }
    outcome = asyncio.run(_run(parse_strategy(strategy), engine, engines, messages, settings, live))
    if trace is not None:
        try:
            trace.write_text(outcome.model_dump_json(indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise OrchestraError(f"cannot write {trace}: {error.strerror}") from error
    if json:
        print(outcome.model_dump_json(exclude={"graph"}, indent=2))
    else:
        _show(outcome, with_text=not live)


async def _run(
    strategy: Any, url: str, engines: dict[str, str], prompt: Prompt, settings: dict[str, Any], live: bool
) -> Outcome:
    import orchestra

    async with orchestra.connect(url, engines) as connection:
        if not live:
            return await connection.run(strategy, prompt, **settings)
        from rich.console import Console

        from orchestra.cli.live import LiveView

        outcome: Outcome | None = None
        with LiveView(Console()) as view:
            async for event in connection.stream(strategy, prompt, **settings):
                view.add(event)
                outcome = event.outcome or outcome
        assert outcome is not None  # the last event of every stream
        return outcome


def _show(outcome: Outcome, with_text: bool) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    if with_text:
        # print, not rich: the text may hold what rich reads as markup, and must not be wrapped.
        print(outcome.text.strip("\n"))
    if outcome.answer is not None:
        console.print("[bold]answer[/bold]", end=" ")
        print(outcome.answer)
    sys.stdout.flush()
    Console(stderr=True, highlight=False).print(f"[dim]{usage_line(outcome.usage, outcome.stopped_by)}[/dim]")


def usage_line(usage: Usage, stopped_by: str | None = None) -> str:
    """Cost in a line."""
    parts = [
        f"{usage.sampled_tokens:,} tokens sampled",
        f"critical path {usage.critical_path_tokens:,}",
        f"{usage.requests} generation{'s' if usage.requests != 1 else ''}",
        f"{usage.wall_seconds:.2f} s",
    ]
    if stopped_by:
        parts.append(f"stopped by {stopped_by}")
    return " · ".join(parts)
