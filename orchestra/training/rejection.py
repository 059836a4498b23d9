"""Evaluation runs as training data: what a strategy got right becomes demonstrations (rejection sampling)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from orchestra.errors import UsageError
from orchestra.evaluation.store import Key, Manifest, Record, read_manifest, read_records
from orchestra.evaluation.traces import Trace, read_traces
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.training.flatten import Row, flatten

Order = Literal["critical_path", "tokens", "repeat"]
ORDERS: dict[Order, Callable[[Record], tuple[int, int]]] = {
    "critical_path": lambda record: (record.usage.critical_path_tokens, record.repeat),
    "tokens": lambda record: (record.usage.sampled_tokens, record.repeat),
    "repeat": lambda record: (record.repeat, 0),
}
"""Which of an item's correct samples come first."""


def chosen(graph: ThreadGraph, end: Edge) -> ThreadGraph:
    """The thread that gave the answer, and the threads whose results were written into it; nothing else of a run.

    What it attends to is kept, and where a node writes down what it has waited for (children of `spawn_join`, threads
    that were joined as text), that is kept too. Other samples of a vote, losers of a race and drafts that were only
    shown in a new prompt are not. What a thread took back (a stop string, an end of sequence that it went on after) is
    kept as context of nothing and is not learned.

    Args:
        graph: of a run.
        end: where the chosen thread ends.

    Returns:
        A graph of its own.
    """
    kept: set[int] = set()
    stack = [end.parent]
    while stack:
        node = graph.nodes[stack.pop()]
        if node.id in kept:
            continue
        kept.add(node.id)
        stack += [edge.parent for edge in node.context]
        if node.context and any(span.origin == "forced" for span in node.spans):
            stack += [wait for wait in node.waits if graph.nodes[wait].engine == node.engine]
    ids = {old: new for new, old in enumerate(sorted(kept))}
    used: dict[int, int] = {}
    for old in ids:
        for parent, length in graph.nodes[old].context:
            used[parent] = max(length, used.get(parent, 0))
    return ThreadGraph([_taken(graph.nodes[old], ids, used.get(old)) for old in ids])


def _taken(node: Node, ids: dict[int, int], used: int | None) -> Node:
    """A node under its new id; of one that others go on from, tokens after the last that they use are not learned."""
    spans: list[Span] = []
    left = len(node) if used is None else used
    for span in node.spans:
        if span.origin == "sampled" and len(span.tokens) != span.count:
            raise UsageError("its engine does not tell token ids")
        bare = replace(span, logprobs=[], tempered=[])
        if span.origin != "sampled" or left >= span.count:
            spans.append(bare)
        else:
            cut = max(left, 0)
            spans += [
                replace(bare, tokens=span.tokens[:cut], count=cut),
                replace(bare, tokens=span.tokens[cut:], count=span.count - cut, text="", weight=0.0),
            ]
        left -= span.count
    return replace(
        node,
        id=ids[node.id],
        context=[Edge(ids[parent], length) for parent, length in node.context],
        waits=[ids[wait] for wait in node.waits if wait in ids],
        spans=[span for span in spans if span.count],
    )


@dataclass
class Found:
    """What a run gave.

    Attributes:
        rows: of the demonstrations, with the sample that each is.
        samples, correct, kept: how many.
        items: items of which at least one sample was kept.
        unusable: why correct samples could not be used, and how many.
    """

    rows: list[tuple[Record, Row]] = field(default_factory=list)
    samples: int = 0
    correct: int = 0
    kept: int = 0
    items: int = 0
    unusable: dict[str, int] = field(default_factory=dict)


def demonstrations(
    folder: Path, *, per_item: int = 1, order: Order = "critical_path", longest: int | None = None
) -> Found:
    """The correct samples of a run as rows: of each item the first `per_item` of them.

    Args:
        folder: of `orchestra eval --traces`.
        per_item: most samples of an item.
        order: which come first: with the shortest critical path, with the fewest tokens, or as they were drawn.
        longest: rows with more tokens are left out.

    Raises:
        UsageError: it is no run folder, or has no traces.
    """
    found = Found()
    records = read_records(folder)
    right: dict[Key, Record] = {record.key: record for record in records if record.correct}
    found.samples, found.correct = len(records), len(right)
    rows: dict[Key, Row] = {}
    for trace in read_traces(folder):
        if trace.key in right:
            made = _row(trace, longest)
            if isinstance(made, Row):
                rows[trace.key] = made
            else:
                found.unusable[made] = found.unusable.get(made, 0) + 1
    taken: dict[str, int] = {}
    for key in sorted(rows, key=lambda key: (key[0], ORDERS[order](right[key]))):
        if taken.get(key[0], 0) < per_item:
            taken[key[0]] = taken.get(key[0], 0) + 1
            found.rows.append((right[key], rows[key]))
    found.kept, found.items = len(found.rows), len(taken)
    return found


def _row(trace: Trace, longest: int | None) -> Row | str:
    """The row of a trace, or why it gives none."""
    if trace.end is None:
        return "the result is no one thread's"
    try:
        row = flatten(chosen(trace.graph, trace.end))
    except UsageError as error:
        return str(error)
    if longest is not None and len(row) > longest:
        return f"more than {longest} tokens"
    return row


def from_run(
    folder: str | Path, *, per_item: int = 1, order: Order = "critical_path", longest: int | None = None
) -> Any:
    """The correct samples of a run as a data set of rows, with the columns `item` and `repeat`; see `demonstrations`.

    Raises:
        UsageError: it is no run folder, has no traces, or nothing that can be learned from.
    """
    return _dataset(demonstrations(Path(folder), per_item=per_item, order=order, longest=longest), Path(folder))


def _dataset(found: Found, folder: Path) -> Any:
    from datasets import Dataset

    if not found.rows:
        why = "; ".join(f"{reason} ({count})" for reason, count in found.unusable.items())
        raise UsageError(
            f"{folder} has no demonstrations: {found.correct} of {found.samples} samples are correct. {why}"
        )
    return Dataset.from_list([row.columns() | {"item": one.id, "repeat": one.repeat} for one, row in found.rows])


def make_from_run(
    folder: str | Path,
    out: str | Path,
    *,
    per_item: int = 1,
    order: Order = "critical_path",
    longest: int | None = None,
    command: str = "",
) -> Found:
    """Write the correct samples of a run as a data set of rows with a card; see `demonstrations`.

    Args:
        folder: see `demonstrations`, as `per_item`, `order` and `longest`.
        out: folder of the data set; `orchestra train sft` takes it as `data`.
        per_item: most samples of an item.
        order: which come first.
        longest: most tokens of a row.
        command: what the card says made it.

    Raises:
        UsageError: see `from_run`; or `out` is there already.
    """
    folder, out = Path(folder), Path(out)
    if out.exists():
        raise UsageError(f"{out} is there already")
    found = demonstrations(folder, per_item=per_item, order=order, longest=longest)
    _dataset(found, folder).save_to_disk(str(out))
    (out / "README.md").write_text(_card(found, read_manifest(folder), per_item, order, command), encoding="utf-8")
    return found


def _card(found: Found, manifest: Manifest, per_item: int, order: Order, command: str) -> str:
    plan = manifest.plan
    tokens = [len(row) for _, row in found.rows]
    learned = [sum(weight != 0 for weight in row.weights) for _, row in found.rows]
    paths = [record.usage.critical_path_tokens for record, _ in found.rows]
    count = max(found.kept, 1)
    lines = [
        f"# Demonstrations by rejection sampling: {plan.task}",
        "",
        f"What `{plan.strategy}` got right on `{plan.task}` {plan.parameters}, one training row each: token ids,",
        "positions, mask and loss weights (`orchestra.training.Row.from_columns` reads them), with item and repeat.",
        "",
        "| | |",
        "|---|---|",
        f"| strategy | `{plan.strategy}` |",
        f"| model | {manifest.facts.get('model', plan.engine)} |",
        f"| run seed, temperature, top-p | {plan.seed}, {plan.temperature}, {plan.top_p} |",
        f"| run started | {manifest.created} |",
        f"| samples, correct, kept | {found.samples:,}, {found.correct:,}, {found.kept:,} |",
        f"| items with a demonstration | {found.items:,} of {plan.limit:,} |",
        f"| kept of an item | at most {per_item}, by {order.replace('_', ' ')} |",
        f"| tokens a row, mean and most | {sum(tokens) / count:,.0f}, {max(tokens, default=0):,} |",
        f"| tokens learned, in all | {sum(learned):,} |",
        f"| critical path, mean | {sum(paths) / count:,.0f} |",
    ]
    lines += [f"| correct but unusable: {reason} | {number:,} |" for reason, number in found.unusable.items()]
    if command:
        lines += ["", "```bash", command, "```"]
    return "\n".join(lines) + "\n"
