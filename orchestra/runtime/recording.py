"""Recorded samples: the file that `replay:` plays and `orchestra eval --strategy sample` writes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestra.errors import UsageError

Key = tuple[str, str]
"""Task and item."""


class _Named(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)  # what else a line has is ignored

    task: str = Field(min_length=1)
    id: str = Field(min_length=1)
    repeat: int = Field(ge=0)


class Recorded(_Named):
    """One recorded sample: a line of the file.

    Attributes:
        task, id: whose sample it is.
        repeat: which of the item's samples, from 0.
        text: all that was sampled, thinking included.
        sampled_tokens: how many tokens that took; 0 only for an empty text.
        finish_reason: `stop`, or `length` if it was cut off.
        answer: what was found in it; None if that is not known: it is extracted again then.
        thinking_tokens: how many of the tokens were thinking.
        prompt_tokens: of the item's prompt.
        confidence: of the sample, in whatever unit it was recorded.
    """

    text: str
    sampled_tokens: int = Field(ge=0)
    finish_reason: Literal["stop", "length"]
    answer: str | None = None
    thinking_tokens: int | None = Field(None, ge=0)
    prompt_tokens: int | None = Field(None, ge=0)
    confidence: float | None = Field(None, allow_inf_nan=False)

    @property
    def notes(self) -> dict[str, Any]:
        """What is known of the whole sample besides its text; see `Node.notes`."""
        return self.model_dump(include={"answer", "thinking_tokens", "confidence"}, exclude_none=True)


class Recording:
    """The samples of one file, by item and repeat.

    Attributes:
        name: the file's name, without its folder.
        fingerprint: SHA-256 of its content.
        items: the samples of each item by repeat. In the place of one that failed when it was recorded, its error:
            the others of its item can be replayed, and asking for it says what is wrong.
    """

    def __init__(self, path: Path) -> None:
        """Read `path`.

        Raises:
            UsageError: there is no such file, or the first of its lines that is not a sample.
        """
        self.name = path.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"cannot read the recorded samples in {path}: {error.strerror}") from error
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.items: dict[Key, dict[int, Recorded | str]] = {}
        lines: dict[tuple[Key, int], int] = {}
        for number, line in enumerate(data.split(b"\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            named, sample = _read(line, where)
            key = named.task, named.id
            if (first := lines.setdefault((key, named.repeat), number)) != number:
                same = f"repeat {named.repeat} of item {named.id!r} of task {named.task!r}"
                raise UsageError(f"{where}: {same} is in line {first} already")
            self.items.setdefault(key, {})[named.repeat] = sample
        if not self.items:
            raise UsageError(f"{path} has no samples: it is empty")
        self._names: dict[str, list[Key]] = {}
        for key in self.items:
            for name in dict.fromkeys((key[1], "/".join(key))):
                self._names.setdefault(name, []).append(key)

    def __len__(self) -> int:
        return sum(1 for _ in self._samples())

    def _samples(self) -> Iterator[Recorded]:
        return (s for samples in self.items.values() for s in samples.values() if isinstance(s, Recorded))

    def find(self, item: str) -> Key:
        """The item called `item`: `TASK/ID`, or `ID` where no two tasks have it; empty: the only one.

        Raises:
            UsageError: there is none, or several.
        """
        some = "/".join(next(iter(self.items)))
        if not item and len(self.items) > 1:
            raise UsageError(
                f"{self.name} has samples of {len(self.items)} items: say whose with item='TASK/ID' (such as {some!r}),"
                " or use `orchestra eval TASK --engine replay:FILE`"
            )
        found = self._names.get(item, []) if item else list(self.items)
        if len(found) > 1:
            names = ", ".join("/".join(key) for key in found)
            raise UsageError(f"item {item!r} is in {len(found)} tasks of {self.name}; say which: {names}")
        if not found:
            near = difflib.get_close_matches(item, self._names, n=1) or [some]
            raise UsageError(
                f"{self.name} has no samples of item {item!r}, only of {len(self.items)} such as {near[0]!r}; ask for"
                " the items that were recorded (the same task, --level, --split and --limit)"
            )
        return found[0]

    def sample(self, key: Key, repeat: int) -> Recorded:
        """Sample number `repeat` of an item.

        Raises:
            UsageError: it was not recorded, or failed.
        """
        samples = self.items[key]
        found = samples.get(repeat)
        if isinstance(found, Recorded):
            return found
        item = "/".join(key)
        if found is not None:
            raise UsageError(
                f"sample {repeat} of item {item!r} failed when it was recorded ({found}); go on with the recording to "
                "retry it, or ask for fewer samples"
            )
        raise UsageError(
            f"sample {repeat} of item {item!r} was asked for, but {self.name} has {_numbers(samples)}; record more with"
            " --repeats, or ask for fewer samples"
        )

    def prompt_tokens(self, key: Key) -> int | None:
        """Tokens of an item's prompt, if they were recorded."""
        samples = (s for s in self.items[key].values() if isinstance(s, Recorded))
        return next((s.prompt_tokens for s in samples if s.prompt_tokens), None)


def _numbers(samples: dict[int, Any]) -> str:
    """Which numbers there are, such as `8 (0 to 7)`."""
    there = sorted(samples)
    if there == list(range(len(there))):
        return f"{len(there)} (0 to {len(there) - 1})"
    missing = [i for i in range(there[-1]) if i not in samples]
    return f"{len(there)} (0 to {there[-1]} without {', '.join(map(str, missing[:5]))}{', ...' if missing[5:] else ''})"


def _read(line: bytes, where: str) -> tuple[_Named, Recorded | str]:
    """One line: whose it is, and the sample or the error that it failed with."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON ({error}); a recording that was cut off ends like that") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where}: a recorded sample is a JSON object, not {type(values).__name__}")
    usage = values.get("usage")
    requests = usage.get("requests", 1) if isinstance(usage, dict) else 1
    if isinstance(requests, int) and requests > 1:
        raise UsageError(
            f"{where}: the outcome of a strategy with {requests} generations, not one sample; record with --strategy"
            " sample --repeats N"
        )
    try:
        if values.get("error") is not None:
            return _Named.model_validate(values), " ".join(str(values["error"]).split())
        sample = Recorded.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        old = "; an older version recorded it: record again" if isinstance(usage, dict) and field not in values else ""
        raise UsageError(f"{where}: {field}: {first['msg'][:1].lower()}{first['msg'][1:]}{old}") from error
    if sample.text and not sample.sampled_tokens:
        raise UsageError(f"{where}: sampled_tokens: 0 for a text of {len(sample.text)} characters")
    return sample, sample
