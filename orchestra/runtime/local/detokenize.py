"""Text from tokens, piece by piece: characters are held back until complete, stop strings found across tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
"""Ids to text."""

_REPLACEMENT = "\ufffd"
_CONTEXT = 6


class Detokenizer:
    """Decodes a growing list of ids. What it gives, concatenated, is the text of the ids after the text before them.

    Ids are decoded with some of the ids before them, because the text of a token may depend on its neighbours (a
    leading space, the bytes of one character).

    Args:
        decode: see `Decode`.
        before: ids that stand before the first one, as many as are known.
    """

    __slots__ = ("_decode", "_ids", "_read", "_shown")

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-_CONTEXT:])
        self._read = len(self._ids)
        self._shown = decode(self._ids) if self._ids else ""

    def push(self, ids: Sequence[int], last: bool = False) -> str:
        """Add ids and return the text that is complete now; with `last`, everything that is left."""
        self._ids += ids
        if len(self._ids) == self._read:
            return ""
        text = self._decode(self._ids)
        if len(text) <= len(self._shown) or (text.endswith(_REPLACEMENT) and not last):
            return ""
        new = text[len(self._shown) :]
        self._ids = self._ids[self._read :]  # the window begins where the last piece began
        self._read = len(self._ids)
        self._shown = self._decode(self._ids)
        return new


class Finder:
    """Looks for stop strings in text that arrives in pieces.

    Args:
        stops: what to look for.
        text: where pieces come from when ids are pushed: special tokens can complete a stop string, hidden or not.

    Attributes:
        keep: characters before a piece that can be part of a stop string.
    """

    __slots__ = ("_stops", "_tail", "_text", "keep")

    def __init__(self, stops: Sequence[str], text: Detokenizer | None = None) -> None:
        self._stops = stops
        self.keep = max(map(len, stops)) - 1
        self._tail = ""
        self._text = text

    def push(self, ids: Sequence[int]) -> str | None:
        """Feed the text of ids."""
        assert self._text is not None
        piece = self._text.push(ids)
        return self.feed(piece) if piece else None

    def feed(self, piece: str) -> str | None:
        """The stop string that is completed first by this piece, the longest of those that end together."""
        text = self._tail + piece
        ends = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            return min(ends)[2]
        self._tail = text[-self.keep :] if self.keep else ""
        return None


def cut(before: str, piece: str, stop: str) -> str:
    """`piece`, which comes after `before`, up to the end of the stop string; all of it where that does not show."""
    tail = before[1 - len(stop) :] if len(stop) > 1 else ""
    at = (tail + piece).find(stop)
    return piece if at < 0 else piece[: at + len(stop) - len(tail)]


class Endings:
    """Which tokens can complete a stop string: a table filled as tokens appear, so most tokens cost one look-up.

    A stop string is complete only in a token whose own text holds its last character, or part of one.
    """

    __slots__ = ("_any", "_decode", "_known", "_last")

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._decode = decode
        self._last = {stop[-1] for stop in stops}
        # White space may come from a token's neighbourhood rather than from itself.
        self._any = any(character.isspace() for character in self._last)
        self._known: dict[int, bool] = {}

    def __contains__(self, token: int) -> bool:
        known = self._known.get(token)
        if known is None:
            text = self._decode([token])
            known = self._any or _REPLACEMENT in text or any(character in text for character in self._last)
            self._known[token] = known
        return known
