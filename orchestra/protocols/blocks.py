"""Languages of parallel blocks: a plan with outlines, a path for each, and what is made of them.

Multiverse, ThreadWeaver, NPR, Parallel-R1 and ParaThinker differ in tags, numbering, nesting and in who writes what.
Those differences are data (`Blocks`); reading, rendering and checking are the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from orchestra.protocols.base import Branch, Protocol
from orchestra.protocols.block_reader import BlockReader, Role
from orchestra.protocols.document import Block, Document

NUMBERED = "{label}"
"""In the name of a path's tag: the tag itself holds the label (`<think3>`)."""
MOST_NUMBERED = 64  # numbered path tags that are known


@dataclass(frozen=True)
class Blocks(Protocol[Document]):
    r"""A language of parallel blocks.

    Attributes:
        name, paper: see `Protocol`.
        path: tag of a path; `{label}` in it stands for the label (`think{label}`).
        block: tag around plan, paths and conclusion; empty where there is none.
        plan: tag around the outlines; empty where the model only opens a block, or does not even ask.
        outline: tag of one outline in the plan.
        conclusion: tag of what is made of the paths; empty where that is plain text after the block.
        nested: how many blocks may stand inside one another; 1: a path holds no block.
        strict: outlines are numbered 1..n, paths come in their order with nothing between them, and neither plan nor
            outlines hold anything else.
        gap: between the tags of a plan that is rendered.
        lead: forced before the paths, into the text that they share.
        header: forced at the beginning of each path.
        after: forced after a path that has ended.
        join: forced after the paths.
        closing: forced where a path was cut off.
        recompute: the published engine writes the paths one after the other instead of reusing their keys and values.
    """

    name: str
    paper: str
    path: str
    block: str = "Parallel"
    plan: str = ""
    outline: str = ""
    conclusion: str = ""
    nested: int = 1
    strict: bool = False
    gap: str = ""
    lead: str = ""
    header: str = ""
    after: str = ""
    join: str = ""
    closing: str = ""
    recompute: bool = False

    @property
    def numbered(self) -> bool:
        """Whether the label is part of the path's tag."""
        return NUMBERED in self.path

    @property
    def labelled(self) -> bool:
        """Whether a path's text begins with its label."""
        return NUMBERED in self.header and not self.numbered

    @cached_property
    def roles(self) -> dict[str, Role]:
        """What each tag name means."""
        names: dict[str, Role] = {}
        if self.block:
            names[self.block] = "block"
        if self.plan:
            names[self.plan] = "plan"
        if self.outline:
            names[self.outline] = "outline"
        labels = range(1, MOST_NUMBERED + 1) if self.numbered else [0]
        names |= {self.path_name(str(label)): "path" for label in labels}
        if self.conclusion:
            names[self.conclusion] = "conclusion"
        return names

    @property
    def tags(self) -> tuple[str, ...]:
        """See `Protocol.tags`."""
        return tuple(tag for name in self.roles for tag in (f"<{name}>", f"</{name}>"))

    @property
    def trigger(self) -> str:
        """The tag with which the model asks for a fork; empty where it does not have to ask."""
        return f"</{self.plan}>" if self.plan else f"<{self.block}>" if self.block else ""

    def path_name(self, label: str) -> str:
        """The name of the tag around the path of a label."""
        return self.path.replace(NUMBERED, label)

    def label_of(self, name: str) -> str:
        """The label in the name of a numbered tag."""
        return name.removeprefix(self.path.partition(NUMBERED)[0])

    def path_end(self, label: str) -> str:
        """The tag that ends the path of a label."""
        return f"</{self.path_name(label)}>"

    def path_header(self, label: str) -> str:
        """What is forced at the beginning of a path."""
        return self.header.replace(NUMBERED, label)

    def path_closing(self, label: str) -> str:
        """What is forced where a path was cut off before its end tag."""
        return self.closing.replace(NUMBERED, label) + self.path_end(label)

    def reader(self, branch: Branch | None = None) -> BlockReader:
        """A reader at the beginning of a text, or inside the path of a branch whose header was forced."""
        return BlockReader(self, branch)

    def render(self, document: Document) -> str:
        """See `Protocol.render`: the text as the engine would have it, its separators included."""
        return "".join(self._part(part) for part in document.parts)

    def _part(self, part: str | Block) -> str:
        if isinstance(part, str):
            return part
        out = self.asking(part) + self.lead
        for path in part.paths:
            body = "".join(self._part(inner) for inner in path.parts)
            out += self.path_header(path.label) + body + self.path_end(path.label) + self.after
        return out + (self.join if part.paths else "") + self.ending(part)

    def asking(self, block: Block) -> str:
        """How a block begins: what the model writes to ask for its paths."""
        out = f"<{self.block}>" if self.block else ""
        if self.plan:
            outlines = [f"<{self.outline}>{o.label}: {o.title}</{self.outline}>" for o in block.outlines]
            plan = [f"<{self.plan}>{block.goal}", *outlines, f"</{self.plan}>"]
            out += (self.gap if out else "") + self.gap.join(plan)
        return out

    def ending(self, block: Block) -> str:
        """How a block ends: what the model writes after its paths and what is forced after them."""
        out = ""
        if self.conclusion and block.conclusion is not None:
            if f"<{self.conclusion}>" not in self.join or not block.paths:
                out += f"<{self.conclusion}>"
            out += f"{block.conclusion}</{self.conclusion}>"
        closes = f"</{self.block}>" if self.block else ""
        return out if not closes or closes in self.join else out + closes
