"""A training row as a picture: its tokens, positions, mask and loss, in the terminal, as a page or as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from orchestra.errors import UsageError
from orchestra.runtime.local.sources import tokenizer_at
from orchestra.training.flatten import Row, dense_mask
from orchestra.training.sft_config import SupervisedConfig
from orchestra.training.text_rows import Renderer
from orchestra.training.texts import PLAIN, example, read_records
from orchestra.training.vocabulary import default_tags

if TYPE_CHECKING:
    from rich.table import Table

EMBEDDED = Path(__file__).parent.parent / "assets" / "embedded"
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f", "#edc948")
"""Of nodes, in turn."""
SHADES = ("blue", "yellow", "green", "red", "cyan", "magenta", "white", "bright_black")
"""The same for terminals."""


def read(
    file: str, index: int, model: str = "", language: str = PLAIN, layout: Literal["graph", "trie"] = "graph"
) -> tuple[Row, list[str]]:
    """A row of a data set, and the text of each of its tokens.

    Args:
        file: rows or texts, whatever `orchestra train sft` takes.
        index: of the row, from 0.
        model: whose tokenizer wrote the rows, or is to encode the texts; default: the embedded model's.
        language: of texts that do not say.
        layout: of texts: see `SupervisedConfig`.

    Raises:
        UsageError: there is no such file, row or tokenizer, or the text is malformed.
    """
    records = read_records(file)
    if not 0 <= index < len(records):
        raise UsageError(f"{file} has rows 0 to {len(records) - 1}; there is no row {index}")
    record = records[index]
    tokenizer = tokenizer_at(model or str(EMBEDDED))
    if "input_ids" in record:
        row = Row.from_columns(record)
    else:
        known = example(record, language)
        tokenizer.add_tokens([tag for tag in default_tags(known.language) if tag not in tokenizer.get_vocab()])
        row = Renderer(tokenizer, SupervisedConfig(layout=layout, longest=1 << 30)).parallel(known)
    if row.tokens and max(row.tokens) >= len(tokenizer):
        raise UsageError(f"row {index} has token {max(row.tokens)}: it is in another model's tokens (--model)")
    return row, [tokenizer.decode([token]) for token in row.tokens]


def visible(word: str) -> str:
    """A token's text with its spaces and line breaks to be seen."""
    return word.replace(" ", "·").replace("\n", "↵").replace("\t", "→") or "∅"


def _places(row: Row) -> dict[int, int]:
    """Nodes in the order in which they come, from 0."""
    return {node: i for i, node in enumerate(row.views)}


def terminal(row: Row, words: Sequence[str], first: int = 0, last: int | None = None) -> Table:
    """Some entries of a row as a table: a line each, with what it sees of the entries that are shown.

    Args:
        row: the row.
        words: text of each of its tokens.
        first: the first entry to show.
        last: the entry after the last one; default: the end.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    end = min(len(row), len(row) if last is None else last)
    mask, places = dense_mask(row), _places(row)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("entry", "position", "node"):
        table.add_column(name, justify="right")
    table.add_column("token", no_wrap=True)
    table.add_column("loss", justify="right")
    table.add_column("sees", no_wrap=True)
    for i in range(first, end):
        style = SHADES[places[row.nodes[i]] % len(SHADES)]
        seen = Text("".join("█" if mask[i, j] else "·" for j in range(first, end)), style=style)
        loss = "echo" if row.echoes[i] else f"{row.weights[i]:g}" if row.weights[i] else ""
        token = Text(visible(words[i]), style=f"dim {style}" if row.echoes[i] else style)
        table.add_row(str(i), str(row.positions[i]), str(places[row.nodes[i]]), token, loss, seen)
    return table


def html(row: Row, words: Sequence[str], title: str = "A training row") -> str:
    """The row as a page of its own: no script, nothing loaded; all text is escaped."""
    size, places = len(row), _places(row)
    cell = max(2, min(12, 900 // max(size, 1)))
    colours = [COLOURS[places[node] % len(COLOURS)] for node in row.nodes]
    squares = []
    for i, line in enumerate(dense_mask(row).tolist()):
        start = None
        for j, seen in enumerate([*line, False]):
            owner = row.nodes[j] if j < size else None
            if start is not None and (not seen or owner != row.nodes[start]):
                squares.append(
                    f'<rect x="{start * cell}" y="{i * cell}" width="{(j - start) * cell}" height="{cell}" '
                    f'fill="{colours[start]}"/>'
                )
                start = None
            if seen and start is None:
                start = j
    tokens = ""
    for i, word in enumerate(words):
        kind = "echo" if row.echoes[i] else "loss" if row.weights[i] else "given"
        said = f"entry {i}, position {row.positions[i]}, node {places[row.nodes[i]]}, loss weight {row.weights[i]:g}"
        tokens += (
            f'<span style="border-color:{colours[i]}" class="{kind}" title="{said}">'
            f"{escape(visible(word))}<small>{row.positions[i]}</small></span>"
        )
    edge = size * cell
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2em; max-width: 70em; color: #222; background: #fff }}
.row {{ font-family: ui-monospace, monospace; line-height: 2.4 }}
.row span {{ border-bottom: 3px solid; margin: 0 1px; padding: 1px 2px; color: #777 }}
.row span {{ white-space: pre; display: inline-block }}
.row .loss {{ color: #000; background: #fff3c4 }}
.row .echo {{ text-decoration: line-through }}
small {{ font-size: 9px; vertical-align: sub; color: #999 }}
svg {{ border: 1px solid #ccc; max-width: 100%; height: auto }}
</style>
<h1>{escape(title)}</h1>
<p>{size} entries, {len(places)} nodes, {sum(row.echoes)} echoes; positions 0 to {max(row.positions, default=0)};
{sum(weight != 0 for weight in row.weights)} tokens are learned (marked). A line's colour is its node; the small
number is the position. Struck through: an echo, which repeats the token that predicts the next one and is seen by
nobody.</p>
<p class="row">{tokens}</p>
<h2>What each entry (line) attends to (column)</h2>
<svg viewBox="0 0 {edge} {edge}" width="{edge}" height="{edge}" shape-rendering="crispEdges">
{"".join(squares)}</svg>
</html>
"""


def png(row: Row, words: Sequence[str], file: Path, title: str = "A training row") -> None:
    """The row as a picture: the mask, coloured by the node that is seen, beside positions and loss weights."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    size, places = len(row), _places(row)
    owners = torch.tensor([places[node] % len(COLOURS) + 1 for node in row.nodes])
    picture = torch.where(dense_mask(row), owners.unsqueeze(0), 0)
    named = size <= 128
    side = min(16.0, max(5.0, 0.16 * size))
    figure = Figure(figsize=(side + 3.5, side + 1), layout="constrained")
    mask, place, loss = figure.subplots(1, 3, sharey=True, width_ratios=[side, 1.6, 0.8])
    mask.imshow(picture.numpy(), cmap=ListedColormap(("#ffffff", *COLOURS)), vmin=0, vmax=len(COLOURS), aspect="auto")
    mask.set(title=title, xlabel="attends to")
    colours = [COLOURS[places[node] % len(COLOURS)] for node in row.nodes]
    place.barh(range(size), [position + 1 for position in row.positions], color=colours, height=0.8)
    place.set(title="position")
    loss.barh(range(size), row.weights, color="#333333", height=0.8)
    loss.set(title="loss")
    if named:
        # A dollar sign would begin a formula.
        labels = [
            visible(word).replace("$", r"\$") + (" (echo)" if row.echoes[i] else "") for i, word in enumerate(words)
        ]
        mask.set_yticks(range(size), labels, fontsize=6, family="monospace")
        for label, colour in zip(mask.get_yticklabels(), colours, strict=True):
            label.set_color(colour)
    figure.savefig(file, dpi=150)
