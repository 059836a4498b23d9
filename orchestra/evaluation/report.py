"""Tables of runs for people."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from orchestra.evaluation.summary import Summary


def percent(mean: float | None, stderr: float | None) -> str:
    """An accuracy with its error, such as `83.0 ± 2.7 %`."""
    if mean is None:
        return "–"
    return f"{100 * mean:.1f} %" if stderr is None else f"{100 * mean:.1f} ± {100 * stderr:.1f} %"


def number(value: float | None) -> str:
    """A whole number with thousands separators."""
    return "–" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds with about three figures."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def table(summaries: Iterable[Summary], title: str = "") -> Table:
    """Runs side by side: accuracy with its error, and the mean cost of a sample.

    Runs on the same items stand together under one heading, in the order given. It fits 80 columns. Where calls of one
    of the runs follow on one another, and so read input again, B_total and B_seq stand below the sampled tokens of
    every run: that is what such runs are compared at.
    """
    summaries = list(summaries)
    budgets = any(map(_chained, summaries))
    groups: dict[str, list[Summary]] = {}
    for summary in summaries:
        groups.setdefault(_items(summary), []).append(summary)
    if len(groups) == 1:
        title = " · ".join(filter(None, [title, *groups]))
    table = Table(box=SIMPLE_HEAD, title=title or None, title_justify="left", title_style="bold")
    table.pad_edge, table.padding = False, (0, 1, 0, 0)
    table.add_column("strategy", overflow="fold", min_width=16)
    total, sequential = ("\n[dim]B_total[/dim]", "\n[dim]B_seq[/dim]") if budgets else ("", "")
    for heading in ("accuracy", f"tokens{total}", f"critical\npath{sequential}", "p95", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True, style="dim" if heading == "p95" else None)
    for heading, group in groups.items():
        if len(groups) > 1:
            table.add_row(f"[bold]{escape(heading)}[/bold]")
        for s in group:
            table.add_row(*_row(s, budgets), end_section=s is group[-1])
    return table


def _chained(s: Summary) -> bool:
    """Whether calls follow on one another: the heaviest chain has the input of one and a half calls or more."""
    if s.sequential_tokens is None or s.total_tokens is None or not s.requests:
        return False
    sampled, path = s.sampled_tokens or 0, s.critical_path_tokens or 0
    return s.sequential_tokens - path > 1.5 * (s.total_tokens - sampled) / s.requests


def _items(summary: Summary) -> str:
    """What it was run on, such as `hard · 100 items × 4`."""
    level = summary.parameters.get("level", "")
    times = f" × {summary.repeats}" if summary.repeats > 1 else ""
    return f"{level}{' · ' if level else ''}{summary.items:,} item{'s' if summary.items != 1 else ''}{times}"


def _row(s: Summary, budgets: bool) -> list[str]:
    budget = [
        f"[dim]{escape(limit.strip())}[/dim]" for limit in (s.budget or "").replace("=", " ≤ ").split(",") if limit
    ]
    return [
        "\n".join([f"[cyan]{escape(s.strategy)}[/cyan]", *budget]),
        "\n".join([f"[bold]{percent(s.accuracy, s.stderr)}[/bold]", *_of_several(s), *_odd(s)]),
        number(s.sampled_tokens) + (f"\n[dim]{number(s.total_tokens)}[/dim]" if budgets else ""),
        number(s.critical_path_tokens) + (f"\n[dim]{number(s.sequential_tokens)}[/dim]" if budgets else ""),
        number(s.critical_path_tokens_p95),
        seconds(s.wall_seconds),
    ]


def _of_several(summary: Summary) -> list[str]:
    """What several samples of an item give together."""
    if summary.repeats == 1:
        return []
    named = (("maj@", summary.maj_at_k), ("pass@", summary.pass_at_k))
    return [f"[dim]{name}{max(values)} {100 * values[max(values)]:.1f} %[/dim]" for name, values in named if values]


def _odd(summary: Summary) -> list[str]:
    """Samples that count neither as right nor as wrong."""
    counts = ((summary.failed, "failed"), (summary.ungraded, "ungraded"))
    return [f"[red]{count:,} {name}[/red]" for count, name in counts if count]
