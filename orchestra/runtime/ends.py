"""The end-of-sequence tokens of a server's model: which they are, and what text of theirs is not to be seen."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

from orchestra.runtime.engine import Delta
from orchestra.runtime.remote import Sample


class Ends:
    """What is known of them: from files if the server's are here, else from generations that ended so.

    Args:
        decode: texts of lists of ids, special tokens shown.

    Attributes:
        ids: their ids.
    """

    def __init__(self, decode: Callable[[list[list[int]]], Awaitable[list[str]]]) -> None:
        self._decode = decode
        self.ids: frozenset[int] = frozenset()
        self._texts: dict[int, str] = {}

    def know(self, ids: Iterable[int]) -> None:
        """These are some."""
        self.ids = self.ids.union(ids)

    async def hide(self, sample: Sample, delta: Delta) -> None:
        """Learn from a delta how sequences end, and take the text of that out of it."""
        if not delta.tokens:
            return
        last = delta.tokens[-1]
        if delta.eos and last not in self.ids:
            self.know([last])
        sampling = sample.request.sampling
        stopped = isinstance(delta.matched, str) and last in self.ids and not sampling.ignore_eos
        if stopped or not (sampling.skip_special_tokens or self.ids.isdisjoint(delta.tokens)):
            new = [token for token in self.ids if token not in self._texts]
            self._texts.update(zip(new, await self._decode([[token] for token in new]), strict=True))
        if stopped and delta.matched != self._texts[last]:
            delta.matched, delta.eos = None, True  # a server that looks for stop strings in the end's own text
        self.strip(sample, delta)

    def strip(self, sample: Sample, delta: Delta) -> None:
        """Take the text of ends out of a delta, as far as it is known."""
        sampling = sample.request.sampling
        if sampling.skip_special_tokens:
            return
        if delta.finish_reason and delta.tokens and (end := self._texts.get(delta.tokens[-1])):
            # Of one that a stop string was found in, the server shows a part.
            shown = next((n for n in range(len(end), 0, -1) if delta.text.endswith(end[:n])), 0)
            delta.text = delta.text[: len(delta.text) - shown]
        if sampling.ignore_eos and not self.ids.isdisjoint((*sample.tokens, *delta.tokens)):
            for text in self._texts.values():
                delta.text = delta.text.replace(text, "") if text else delta.text


def ends_in(folder: str) -> frozenset[int]:
    """The end-of-sequence ids that a model folder names; none if it is not on this machine."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            said: Any = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            ids = said.get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        found.update(token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int)
    return frozenset(found)
