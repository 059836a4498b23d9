"""What every protocol is: a language in which a model asks for threads, and how what they say is written down."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

from orchestra.graph import Edge, ThreadGraph
from orchestra.protocols.lexer import Place

D = TypeVar("D")


class Problem(NamedTuple):
    """Where a text breaks the rules of its protocol."""

    at: Place
    message: str

    def __str__(self) -> str:
        return f"{self.at}: {self.message}"


@dataclass(frozen=True, slots=True)
class Branch:
    """A thread that a model has asked for.

    Attributes:
        label: its name, such as `2` or `1.3`.
        title: what it is to do.
    """

    label: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """A model asks for threads now.

    Attributes:
        branches: which; empty where it leaves their number to the runtime.
    """

    branches: tuple[Branch, ...] = ()


class Reader(abc.ABC, Generic[D]):
    """Reads a text of a protocol as it is written, in pieces of any size.

    Attributes:
        problems: what was wrong so far. Nothing in a text makes a reader fail: what has no place is plain text.
        document: what was read so far.
    """

    problems: list[Problem]
    document: D

    @abc.abstractmethod
    def feed(self, text: str) -> Fork | None:
        """Read on. Returns the last fork that this text asks for, if it asks for one."""

    @abc.abstractmethod
    def close(self) -> D:
        """The text has ended: the document."""


class Protocol(abc.ABC, Generic[D]):
    """A tag language. One definition, used by strategies, training data and viewer alike.

    Attributes:
        name: in specs.
        paper: where it comes from.
    """

    name: str
    paper: str

    @property
    @abc.abstractmethod
    def tags(self) -> tuple[str, ...]:
        """The literal tags, in the order in which they are added to a tokenizer."""

    @abc.abstractmethod
    def reader(self) -> Reader[D]:
        """A reader at the beginning of a text."""

    @abc.abstractmethod
    def render(self, document: D) -> str:
        """The text of a document: `parse` reads it back."""

    def parse(self, text: str) -> D:
        """The document in a text; whatever is malformed stays plain text."""
        reader = self.reader()
        reader.feed(text)
        return reader.close()

    def validate(self, text: str) -> list[Problem]:
        """What is wrong with a text, in order."""
        reader = self.reader()
        reader.feed(text)
        reader.close()
        return sorted(reader.problems)


def transcript(graph: ThreadGraph, end: int | None = None) -> str:
    """A thread of a graph as text: all that stands after the prompt, joined branches one after the other.

    Args:
        graph: of a run.
        end: the node with which the thread ends; default: the last one that was sampled.
    """
    if end is None:
        end = max((node.id for node in graph.nodes if node.count("sampled")), default=len(graph.nodes) - 1)
    if end < 0:
        return ""
    order: dict[int, None] = {}
    stack = [(Edge(end, len(graph.nodes[end])), False)]
    while stack:  # depth first, so that the branches of a join stand one after the other
        edge, done = stack.pop()
        if done:
            order.setdefault(edge.parent)
        elif edge.parent not in order:
            stack.append((edge, True))
            stack += [(parent, False) for parent in reversed(graph.nodes[edge.parent].context)]
    lengths = graph.view([Edge(end, len(graph.nodes[end]))])
    return "".join(_text(graph, node, lengths[node]) for node in order)


def _text(graph: ThreadGraph, node: int, length: int) -> str:
    """The text of a node's first `length` tokens, as far as spans tell; prompts are left out."""
    text = ""
    for span in graph.nodes[node].spans:
        if length <= 0:
            break
        text += "" if span.origin == "prompt" else span.text
        length -= span.count
    return text
