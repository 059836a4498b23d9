"""Tags in text that arrives in pieces: which are there, where they stand, and which are only talked about."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["text", "open", "close"]

_OPENING_QUOTE = re.compile(r"(?:^|[\s(\[{])[\"'“‘«]$")
_LOOK_BACK = 2  # characters that say whether a quote opens


class Place(NamedTuple):
    """Where something stands; both count from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


@dataclass(frozen=True, slots=True)
class Token:
    """A tag, or text between tags (which may come in several pieces).

    Attributes:
        kind: what it is.
        text: as it stands in the text.
        name: of the tag; empty for text.
        at: where it begins.
    """

    kind: Kind
    text: str
    name: str
    at: Place


class Lexer:
    """Splits text into tags and text, however it is cut into pieces.

    A tag is literal, such as `<Path>` or `</Path>`. One inside a code span, inside a fenced code block or right after
    an opening quotation mark is talked about, and is text. What is decided never depends on what comes after the tag,
    because a generation ends with the tag that it was stopped at.

    Args:
        names: of the tags that are known.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._tags: dict[str, tuple[Kind, str]] = {}
        for name in names:
            self._tags[f"<{name}>"] = ("open", name)
            self._tags[f"</{name}>"] = ("close", name)
        longest_first = sorted(self._tags, key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, longest_first)) + r"|`+|\n")
        self._prefixes = {tag[:end] for tag in self._tags for end in range(1, len(tag))}
        self._longest = max(map(len, self._tags))
        self._held = ""
        self._before = ""  # the last characters that were given out
        self._line, self._column = 1, 1
        self._blank = True  # nothing but white space on this line so far
        self._fence = ""  # the backticks that opened the code block
        self._code = False

    @property
    def at(self) -> Place:
        """Where the next token begins."""
        return Place(self._line, self._column)

    @property
    def end_of_code(self) -> str:
        """What ends the code that is open here; empty if none is."""
        return f"\n{self._fence}\n" if self._fence else "`" if self._code else ""

    def feed(self, piece: str) -> list[Token]:
        """The tokens that are complete with this piece; an end that may become a tag is held back."""
        text = self._held + piece
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return self._split(text[: len(text) - keep])

    def close(self) -> list[Token]:
        """The rest: nothing more will come."""
        rest, self._held = self._held, ""
        return self._split(rest)

    def _undecided(self, text: str) -> int:
        """Characters at the end that more text may make part of a tag, or of a run of backticks."""
        if text.endswith("`"):
            return len(text) - len(text.rstrip("`"))
        opened = text.rfind("<", max(0, len(text) - self._longest))
        return len(text) - opened if opened >= 0 and text[opened:] in self._prefixes else 0

    def _split(self, text: str) -> list[Token]:
        tokens: list[Token] = []
        start = 0
        for mark in self._mark.finditer(text):
            found = mark[0]
            if found == "\n" or found[0] == "`":
                continue
            self._pass(text[start : mark.start()], tokens)
            kind, name = self._tags[found]
            if self._talked_about():
                kind, name = "text", ""
            self._give(kind, found, name, tokens)
            self._blank = False
            start = mark.end()
        self._pass(text[start:], tokens)
        return tokens

    def _pass(self, text: str, tokens: list[Token]) -> None:
        """Give out plain text, noting the code in it."""
        at = 0
        for mark in re.finditer(r"`+|\n", text):
            if text[at : mark.start()].strip():
                self._blank = False
            if mark[0] == "\n":
                self._blank, self._code = True, False
            elif self._fence:
                if self._blank and len(mark[0]) >= len(self._fence):
                    self._fence = ""
                self._blank = False
            elif self._blank and len(mark[0]) >= 3:
                self._fence, self._blank = mark[0], False
            else:
                self._code, self._blank = not self._code, False
            at = mark.end()
        if text[at:].strip():
            self._blank = False
        self._give("text", text, "", tokens)

    def _talked_about(self) -> bool:
        return bool(self._fence) or self._code or _OPENING_QUOTE.search(self._before) is not None

    def _give(self, kind: Kind, text: str, name: str, tokens: list[Token]) -> None:
        if not text:
            return
        if kind == "text" and tokens and tokens[-1].kind == "text":
            last = tokens[-1]
            tokens[-1] = Token("text", last.text + text, "", last.at)
        else:
            tokens.append(Token(kind, text, name, self.at))
        head, newline, tail = text.rpartition("\n")
        if newline:
            self._line += head.count("\n") + 1
            self._column = len(tail) + 1
        else:
            self._column += len(text)
        self._before = (self._before + text)[-_LOOK_BACK:]
