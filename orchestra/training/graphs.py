"""Demonstrations as thread graphs: the graph that a strategy would have made, had the model said what a text says.

What the orchestrator writes at run time (headers of paths, results of children) becomes forced spans, what the model
writes becomes sampled ones, encoded piece by piece as an engine encodes them. So `flatten` of such a graph is the row
that serving computes, token by token, and its loss falls on exactly what the model will have to say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from orchestra.errors import UsageError
from orchestra.graph import Edge, Node, Span, ThreadGraph
from orchestra.protocols import PROTOCOLS, apr
from orchestra.protocols.async_think import ASYNC_THINK, UNJOINED, Joined, Organised, Task
from orchestra.protocols.blocks import Blocks
from orchestra.protocols.document import Block, Document
from orchestra.runtime.engine import Prompt
from orchestra.strategies.prompts import alike, followed_by


class Encoder(Protocol):
    """What encodes for a model; `orchestra.runtime.local.prompts.Prompts` does it as the engines do."""

    def prompt(self, prompt: Prompt, **template: Any) -> Span:
        """A prompt with what the tokenizer puts before it, or with the chat template around it."""

    def forced(self, text: str) -> Span:
        """Text as it stands."""


def graph_of(
    prompt: Prompt,
    text: str,
    language: str,
    encoder: Encoder,
    eos: int,
    *,
    branches: Sequence[str] = (),
    opening: str = "",
    join: str = "auto",
    shared: bool = True,
) -> ThreadGraph:
    """The graph of a demonstration.

    Args:
        prompt: text or messages.
        text: what follows, in the language: what the model writes and what is forced between. Separators are those of
            the language's definition, whatever stands between the tags of `text`.
        language: a key of `orchestra.protocols.PROTOCOLS`, or `plain`: one generation.
        encoder: of the model.
        eos: id of the token that ends a generation.
        branches: texts of the children (`apr`) or workers (`async_think`) in the order in which they are asked for.
        opening: forced before `text`.
        join: of blocks: `reuse`, `recompute`, or `auto`: as the language was published.
        shared: workers are shown the prompt before their sub-query.

    Returns:
        A graph whose sampled spans weigh 1.

    Raises:
        UsageError: an unknown language, a text that is malformed in it (with line and column), or `branches` that do
            not fit it.
    """
    writer = _Writer(ThreadGraph(), encoder, eos)
    start = writer.begin(prompt, opening)
    if language == "plain":
        writer.write(start, text)
        return writer.graph
    if (protocol := PROTOCOLS.get(language)) is None:
        raise UsageError(f"unknown language {language!r} (known: plain, {', '.join(PROTOCOLS)})")
    # A worker that nobody joins is cancelled when the organiser ends: at run time no fault, and none to teach.
    if problems := [one for one in protocol.validate(text) if not one.message.endswith(UNJOINED)]:
        raise UsageError(f"not a text of {language}: {problems[0]}")
    if isinstance(protocol, Blocks):
        if branches:
            raise UsageError(f"the paths of {language} stand in its text; it has no branches beside it")
        recompute = protocol.recompute if join == "auto" else join == "recompute"
        _BlockWriter(writer, protocol, recompute).text(start, protocol.parse(text))
    elif language == apr.APR.name:
        _search(writer, start, str(prompt), text, branches)
    else:
        ask = partial(followed_by if shared else alike, prompt)
        _organised(writer, start, ask, ASYNC_THINK.parse(text), branches)
    return writer.graph


@dataclass
class _Writer:
    """Writes spans into nodes, each of which is a stretch that one thread goes on with."""

    graph: ThreadGraph
    encoder: Encoder
    eos: int

    def begin(self, prompt: Prompt, opening: str = "", waits: Sequence[Node] = ()) -> Node:
        node = self.graph.add(spans=[self.encoder.prompt(prompt)], waits=[one.id for one in waits])
        self.force(node, opening)
        return node

    def after(self, before: Node, waits: Sequence[Node] = ()) -> Node:
        return self.graph.add([Edge(before.id, len(before))], waits=[one.id for one in waits])

    def force(self, node: Node, text: str) -> None:
        if text:
            node.spans.append(self.encoder.forced(text))

    def write(self, node: Node, text: str, *, ends: bool = True) -> None:
        """One generation; `ends` with the token that ends it, else with what it was stopped at."""
        span = self.encoder.forced(text)
        span.origin = "sampled"
        if ends:
            span.tokens, span.count = [*span.tokens, self.eos], span.count + 1
        if span.count:
            node.spans.append(span)


@dataclass
class _BlockWriter:
    """Follows a document as `orchestra.strategies.fork_join` follows a model."""

    writer: _Writer
    language: Blocks
    recompute: bool

    def text(self, node: Node, document: Document) -> Node:
        said, node = self._parts(node, document.parts, "")
        self.writer.write(node, said)
        return node

    def _parts(self, node: Node, parts: Sequence[str | Block], said: str) -> tuple[str, Node]:
        """Write parts. Returns what the last generation has said so far, and where it stands."""
        for part in parts:
            if isinstance(part, str):
                said += part
            elif not part.paths:
                said += self.language.asking(part) + self.language.ending(part)
            else:
                self.writer.write(node, said + self.language.asking(part), ends=False)
                node = self._block(node, part)
                said = self.language.ending(part)
        return said, node

    def _block(self, base: Node, block: Block) -> Node:
        language, writer = self.language, self.writer
        writer.force(base, language.lead)
        ends: list[Node] = []
        for path in block.paths:
            node = writer.after(base)
            writer.force(node, language.path_header(path.label))
            said, node = self._parts(node, path.parts, "")
            writer.write(node, said + language.path_end(path.label), ends=False)
            writer.force(node, language.after)
            ends.append(node)
        if not self.recompute:
            join = writer.graph.add(
                [Edge(node.id, len(node)) for node in ends], spans=[writer.encoder.forced(language.join)]
            )
            return join
        node = writer.after(base, ends)
        for end in ends:
            for one in _spine(writer.graph, base, end):
                node.spans += [Span("forced", list(span.tokens), span.count, span.text) for span in one.spans]
        writer.force(node, language.join)
        return node


def _spine(graph: ThreadGraph, base: Node, end: Node) -> list[Node]:
    """The nodes of a recomputed path, from after `base` to its end: blocks nested in it are written out there."""
    chain = [end]
    while chain[0].context[0].parent != base.id:
        chain.insert(0, graph.nodes[chain[0].context[0].parent])
    return chain


def _search(writer: _Writer, start: Node, asked: str, text: str, branches: Sequence[str]) -> None:
    """A parent of `apr` and its children, as `spawn_join` runs them."""
    node, left = start, text
    if left.startswith(f"\n {apr.HEADER}"):
        header, newline, left = left[1:].partition("\n")
        writer.force(node, f"\n{header}{newline}")
    waiting = list(branches)
    while apr.JOIN in left:
        turn, tag, left = left.partition(apr.JOIN)
        writer.write(node, turn + tag, ends=False)
        spawned = apr.parse_spawn(turn)
        children = []
        lines = left.removeprefix("\n").split("\n")
        results, left = lines[: len(spawned)], "\n".join(lines[len(spawned) :])
        if branches:
            if len(waiting) < len(spawned):
                raise UsageError(f"children that are asked for: {len(spawned)}, but {len(waiting)} are told")
            said, waiting = waiting[: len(spawned)], waiting[len(spawned) :]
            for line, child in zip(spawned, said, strict=True):
                children.append(writer.begin(apr.child_prompt(line, asked), waits=[node]))
                writer.write(children[-1], child)
            results = [apr.child_result(child) or apr.NONE for child in said]
        node = writer.after(node, children)
        writer.force(node, apr.render_join(None if result.strip() == apr.NONE else result for result in results))
    if waiting:
        raise UsageError(f"more children are told than are asked for: {len(waiting)}")
    writer.write(node, left)


def _organised(
    writer: _Writer, start: Node, ask: Callable[[str], Prompt], document: Organised, branches: Sequence[str]
) -> None:
    """An organiser of `async_think` and its workers."""
    tasks = [part for part in document.parts if isinstance(part, Task)]
    if branches and len(branches) != len(tasks):
        raise UsageError(f"forked tasks: {len(tasks)}, but workers that are told: {len(branches)}")
    said = ""
    node, told = start, iter(branches)
    working: dict[str, tuple[Node | None, str | None]] = {}
    for part in document.parts:
        if isinstance(part, str):
            said += part
        elif isinstance(part, Task):
            writer.write(node, f"{said}<FORK-{part.label}>{part.query}</FORK-{part.label}>", ends=False)
            said, worker, result = "", None, part.result
            if branches:
                text = next(told)
                worker = writer.begin(ask(part.query), waits=[node])
                writer.write(worker, text)
                result = ASYNC_THINK.result(text)
            working[part.label] = worker, result
            node = writer.after(node)
        else:
            assert isinstance(part, Joined)
            writer.write(node, f"{said}<JOIN-{part.label}>", ends=False)
            said, (worker, result) = "", working.pop(part.label, (None, None))
            node = writer.after(node, [] if worker is None else [worker])
            writer.force(node, ASYNC_THINK.returned(part.label, result))
    writer.write(node, said)
