"""Reads parallel blocks as they are written, whatever is wrong with them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from orchestra.protocols.base import Branch, Fork, Problem, Reader
from orchestra.protocols.document import Block, Document, Path
from orchestra.protocols.lexer import Lexer, Place, Token

if TYPE_CHECKING:
    from orchestra.protocols.blocks import Blocks

Role = Literal["text", "block", "plan", "outline", "path", "conclusion"]

_LABEL = re.compile(r"\s{0,100}(\d{1,6}(?:\.\d{1,6}){0,10})\s{0,100}:")


@dataclass
class _Open:
    """An element that is being read.

    Attributes:
        role, name: what it is, and its tag's name.
        at: where it begins.
        block: the block that it is, or is part of; None for plain text and for a path whose block is elsewhere.
        parts: of plain text and of a path.
        words: text of a plan, an outline or a conclusion; of a block, what stands between its parts.
        tagged: whether an end tag is to come; some blocks have none.
        strayed: whether text where none belongs was noted already.
    """

    role: Role
    name: str
    at: Place
    block: Block | None = None
    parts: list[str | Block] = field(default_factory=list)
    words: str = ""
    tagged: bool = True
    strayed: bool = False


class BlockReader(Reader[Document]):
    """See `Reader`. What is malformed is noted in `problems`; an element that is left open ends with the one around it.

    Args:
        protocol: the language.
        branch: reads the path of this branch, whose header was forced; None: a whole text.

    Attributes:
        ended: whether the end tag of that path has been read.
    """

    def __init__(self, protocol: Blocks, branch: Branch | None = None) -> None:
        self.problems: list[Problem] = []
        self.document = Document()
        self.ended = False
        self._protocol = protocol
        self._roles = protocol.roles
        self._lexer = Lexer(self._roles)
        role: Role = "text" if branch is None else "path"
        name = "" if branch is None else protocol.path_name(branch.label)
        self._stack = [_Open(role, name, self._lexer.at, parts=self.document.parts)]
        self._fork: Fork | None = None

    def feed(self, text: str) -> Fork | None:
        """See `Reader.feed`."""
        self._fork = None
        for token in self._lexer.feed(text):
            self._take(token)
        return self._fork

    def close(self) -> Document:
        """See `Reader.close`."""
        for token in self._lexer.close():
            self._take(token)
        while len(self._stack) > 1:
            self._unclosed(self._stack[-1])
            self._pop()
        if self._stack[0].role == "path" and not self.ended:
            self._unclosed(self._stack[0])
        return self.document

    def joined(self, branches: list[Branch]) -> None:
        """The runtime has run these branches of the fork that was asked for, and has forced what comes after them."""
        block = self._stack[-1].block
        if block is None:  # a language in which nobody asks
            block = self._begin("", self._lexer.at)
        block.paths += [Path(branch.label) for branch in branches]
        self.feed(self._protocol.join)

    def closing(self, branch: Branch) -> str:
        """What to force where the path of `branch` was cut off: the end of open code, then the end of the path."""
        for token in self._lexer.close():
            self._take(token)
        return self._lexer.end_of_code + self._protocol.path_closing(branch.label)

    # -- tags --------------------------------------------------------------------------------------------------------

    def _take(self, token: Token) -> None:
        if self.ended:
            return  # after the end of its path nothing is this reader's
        if token.kind == "text":
            self._write(token.text, token.at)
        elif token.kind == "close":
            self._end(token)
        else:
            wrong = self._open(token, self._roles[token.name])
            if wrong is not None:
                self._complain(token.at, f"{token.text} {wrong}")
                self._write(token.text)

    def _open(self, token: Token, role: Role) -> str | None:
        """Open an element; returns what is wrong with doing so, if anything is."""
        top, protocol = self._stack[-1], self._protocol
        if role == "block" or (role == "plan" and not protocol.block):
            if top.role not in ("text", "path"):
                return f"inside <{top.name}>"
            if sum(frame.role == "block" for frame in self._stack) >= protocol.nested:
                return f"nested more than {protocol.nested} deep" if protocol.nested > 1 else "inside a block"
            self._begin(protocol.block, token.at)
            if role == "block":
                self._fork = None if protocol.plan else Fork()
                return None
            top = self._stack[-1]
        if role == "outline" and top.role == "outline":
            self._unclosed(top)
            self._pop()
            top = self._stack[-1]
        if role == "path" and top.role == "path" and len(self._stack) > 1:
            self._unclosed(top)
            self._pop()
            top = self._stack[-1]
        block = top.block
        if role == "plan" and (top.role != "block" or block is None or block.outlines or block.paths):
            return "is not where a block begins"
        if role == "outline" and top.role != "plan":
            return f"outside <{protocol.plan}>"
        if role == "path":
            if not protocol.block and not protocol.plan and top.role in ("text", "path"):
                block = self._begin("", token.at)
                top = self._stack[-1]
            if top.role != "block" or block is None:
                return "outside a block"
            if protocol.plan and not block.outlines:
                return f"before <{protocol.plan}>"
            if protocol.strict and block.paths and top.words:
                self._complain(token.at, "there is something between the paths")
            top.words = ""
            block.paths.append(Path(""))
        if role == "conclusion":
            block = block if top.role == "block" else self._last_block(top)
            if block is None or not block.paths or block.conclusion is not None:
                return "does not come after paths"
        frame = _Open(role, token.name, token.at, block)
        if role == "path" and block is not None:
            frame.parts = block.paths[-1].parts
        self._stack.append(frame)
        return None

    def _begin(self, name: str, at: Place) -> Block:
        block = Block()
        self._stack[-1].parts.append(block)
        self._stack.append(_Open("block", name, at, block, tagged=bool(name)))
        return block

    @staticmethod
    def _last_block(frame: _Open) -> Block | None:
        """The block right before, where conclusions come after the end of their block."""
        if frame.role not in ("text", "path"):
            return None
        rest = [part for part in frame.parts if not isinstance(part, str) or part.strip()]
        return rest[-1] if rest and isinstance(rest[-1], Block) else None

    def _end(self, token: Token) -> None:
        depth = next((i for i in reversed(range(len(self._stack))) if self._stack[i].name == token.name), None)
        if depth is None or (depth == 0 and self._stack[0].role == "text"):
            self._complain(token.at, f"{token.text} closes nothing")
            self._write(token.text)
            return
        while len(self._stack) > depth + 1:
            if self._stack[-1].tagged:
                self._unclosed(self._stack[-1])
            self._pop()
        if depth == 0:
            self.ended = True
            return
        ends = self._stack[-1]
        self._pop()
        if ends.role == "conclusion" and not self._protocol.block and self._stack[-1].role == "block":
            self._pop()

    def _pop(self) -> None:
        frame = self._stack.pop()
        block = frame.block
        if block is None:
            return
        if frame.role == "outline":
            self._outline(block, frame)
        elif frame.role == "plan":
            block.goal = block.goal or frame.words.strip()
            self._plan(block, frame)
        elif frame.role == "path":
            self._label(block, frame)
        elif frame.role == "conclusion":
            forced = self._protocol.join.rpartition(f"<{frame.name}>")[2]
            block.conclusion = frame.words.removeprefix(forced)
        else:
            self._check(block, frame)
            if not frame.tagged and frame.words:
                self._write(frame.words)  # white space that turns out to stand behind it

    # -- text --------------------------------------------------------------------------------------------------------

    def _write(self, text: str, at: Place | None = None) -> None:
        """Add text to what is open. `at` is where it stands; without it nothing is said about its being there."""
        top = self._stack[-1]
        if top.role == "block" and not top.tagged and text.strip():
            self._pop()  # a block without tags ends where plain text goes on
            top = self._stack[-1]
        if top.role in ("text", "path"):
            if top.parts and isinstance(top.parts[-1], str):
                top.parts[-1] += text
            else:
                top.parts.append(text)
            return
        if top.role == "block" and self._concludes_in_plain_text(top):
            assert top.block is not None  # it is one
            top.block.conclusion = (top.block.conclusion or "") + text if text.strip() else top.block.conclusion
        elif at is not None and text.strip() and not top.strayed and (wrong := self._stray(top)) is not None:
            top.strayed = True
            self._complain(_first_word(at, text), wrong)
        top.words += text

    def _concludes_in_plain_text(self, frame: _Open) -> bool:
        return bool(frame.block and frame.block.paths) and not self._protocol.conclusion

    def _stray(self, frame: _Open) -> str | None:
        """What is wrong with text right here, if anything is."""
        if frame.role == "plan" and self._protocol.strict:
            return f"text in <{frame.name}> outside its outlines"
        if frame.role == "plan" and frame.block and frame.block.outlines:
            return f"text between the outlines of <{frame.name}>"
        return f"text in <{frame.name}> outside its parts" if frame.role == "block" else None

    # -- labels ------------------------------------------------------------------------------------------------------

    def _outline(self, block: Block, frame: _Open) -> None:
        plan = self._stack[-1]
        if not block.outlines:
            block.goal, plan.words = plan.words.strip(), ""
        match = _LABEL.match(frame.words)
        if match is None:
            self._complain(frame.at, f"<{frame.name}> has no label")
        elif any(known.label == match[1] for known in block.outlines):
            self._complain(frame.at, f"label {match[1]} is there already")
        else:
            block.outlines.append(Branch(match[1], frame.words[match.end() :].strip()))

    def _plan(self, block: Block, frame: _Open) -> None:
        if not block.outlines:
            self._complain(frame.at, f"<{frame.name}> has no outlines")
            return
        labels = [branch.label for branch in block.outlines]
        if self._protocol.strict and labels != [str(i + 1) for i in range(len(labels))]:
            self._complain(frame.at, f"outlines are numbered 1 to {len(labels)}, not {', '.join(labels)}")
        self._fork = Fork(tuple(block.outlines))

    def _label(self, block: Block, frame: _Open) -> None:
        path = next(path for path in block.paths if path.parts is frame.parts)
        if self._protocol.numbered:
            path.label = self._protocol.label_of(frame.name)
            return
        if not self._protocol.labelled:
            return
        first = path.parts[0] if path.parts and isinstance(path.parts[0], str) else ""
        match = _LABEL.match(first)
        if match is not None:
            path.label = match[1]
            path.parts[0] = first[match.end() :]
            if not path.parts[0]:
                del path.parts[0]
        else:
            self._complain(frame.at, f"<{frame.name}> has no label")

    def _check(self, block: Block, frame: _Open) -> None:
        """At the end of a block: has each outline its path?"""
        asked, there = [branch.label for branch in block.outlines], [path.label for path in block.paths]
        if not self._protocol.plan or not block.outlines:
            return
        if missing := [label for label in asked if label not in there]:
            self._complain(frame.at, f"no path for outline {', '.join(missing)}")
        if unknown := [label for label in there if label and label not in asked]:
            self._complain(frame.at, f"no outline for path {', '.join(unknown)}")
        known = [label for label in there if label in asked]
        if len(set(known)) < len(known) or (self._protocol.strict and known != asked[: len(known)]):
            self._complain(frame.at, "paths are not in the order of their outlines, each once")
        inside = bool(self._protocol.block) and f"</{self._protocol.block}>" not in self._protocol.join
        if self._protocol.conclusion and inside and block.paths and block.conclusion is None:
            self._complain(frame.at, f"no <{self._protocol.conclusion}> in the block")

    def _unclosed(self, frame: _Open) -> None:
        if frame.tagged:
            self._complain(frame.at, f"<{frame.name}> is not closed")

    def _complain(self, at: Place, message: str) -> None:
        self.problems.append(Problem(at, message))


def _first_word(at: Place, text: str) -> Place:
    """Where the first character that is no white space stands."""
    blank = text[: len(text) - len(text.lstrip())]
    line, newline, rest = blank.rpartition("\n")
    return Place(at.line + line.count("\n") + 1, len(rest) + 1) if newline else Place(at.line, at.column + len(blank))
