"""What a text of parallel blocks says."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestra.protocols.base import Branch


@dataclass
class Path:
    """One thread of a block: its label, and its text, with the blocks nested in it where they stand."""

    label: str
    parts: list[str | Block] = field(default_factory=list)


@dataclass
class Block:
    """A parallel block.

    Attributes:
        goal: text of the plan before its outlines.
        outlines: the threads asked for.
        paths: what they wrote.
        conclusion: what was made of them, inside the block; None where nobody concluded.
    """

    goal: str = ""
    outlines: list[Branch] = field(default_factory=list)
    paths: list[Path] = field(default_factory=list)
    conclusion: str | None = None


@dataclass
class Document:
    """A text: plain text, and blocks where they stand."""

    parts: list[str | Block] = field(default_factory=list)

    @property
    def blocks(self) -> list[Block]:
        """All blocks, outer ones before those nested in them."""
        found: list[Block] = []
        todo = [part for part in self.parts if isinstance(part, Block)]
        while todo:
            block = todo.pop(0)
            found.append(block)
            todo = [part for path in block.paths for part in path.parts if isinstance(part, Block)] + todo
        return found
