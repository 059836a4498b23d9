"""Demonstrations as text, with the tags of a language in them: the columns, and how they become training rows.

A record has `messages` (a conversation, whose last turn, the assistant's, is the demonstration) or `prompt` (text or
messages) and `completion`; and, if it likes, `language`, `plain` (the demonstration as plain text; by default it is the
text without tags), and the texts of helpers with contexts of their own: `children` (APR) or `workers` (async_think), in
the order in which they were asked for. docs/sft.md tells users.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestra.errors import UsageError, one_of
from orchestra.protocols import PROTOCOLS
from orchestra.runtime.engine import Message, Prompt

PLAIN = "plain"
COLUMNS = ("messages", "prompt", "completion", "language", "plain", "children", "workers")


@dataclass(frozen=True)
class Example:
    """One demonstration.

    Attributes:
        prompt: text, or the messages before the demonstration.
        text: what the model is to write, and in it what the orchestrator forces.
        language: what it is written in: a name in `PROTOCOLS`, or `plain`.
        plain: the same as plain text.
        helpers: texts of threads with contexts of their own, in the order in which they were asked for.
    """

    prompt: Prompt
    text: str
    language: str = PLAIN
    plain: str = ""
    helpers: tuple[str, ...] = ()

    def suffixed(self, suffix: str) -> Example:
        """With `suffix` after the prompt, or after the last message of the user's."""
        if not suffix:
            return self
        if isinstance(self.prompt, str):
            return replace(self, prompt=self.prompt + suffix)
        messages = list(self.prompt)
        last = max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=None)
        if last is not None:
            messages[last] = {**messages[last], "content": f"{messages[last]['content']}{suffix}"}
        return replace(self, prompt=messages)


def example(record: Mapping[str, Any], language: str = PLAIN) -> Example:
    """Read a record.

    Args:
        record: a row of the data; see the module for its columns. Columns that are None are not there.
        language: of a record that does not say.

    Raises:
        UsageError: what is wrong with its columns.
    """
    record = {name: value for name, value in record.items() if value is not None}
    prompt, text = _turns(record)
    language = record.get("language", language)
    if language != PLAIN and language not in PROTOCOLS:
        raise UsageError(one_of("language", str(language), [*PROTOCOLS, PLAIN]))
    helpers = record.get("children", record.get("workers", []))
    if not isinstance(helpers, list) or not all(isinstance(helper, str) for helper in helpers):
        raise UsageError("children and workers are lists of texts")
    plain = record.get("plain")
    if plain is None:
        plain = untagged(text, language)
    return Example(prompt, text, language, plain, tuple(helpers))


def _turns(record: Mapping[str, Any]) -> tuple[Prompt, str]:
    """What stands before the demonstration, and the demonstration."""
    if "messages" in record:
        messages = _messages(record["messages"], "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise UsageError("messages: the last one is to be the assistant's, after at least one other")
        return messages[:-1], str(messages[-1]["content"])
    if "prompt" not in record or "completion" not in record:
        raise UsageError(f"neither messages nor prompt and completion: it has {', '.join(record) or 'nothing'}")
    prompt, completion = record["prompt"], record["completion"]
    if not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
    if not isinstance(completion, str):
        turns = _messages(completion, "completion")
        if len(turns) != 1 or turns[0]["role"] != "assistant":
            raise UsageError("completion: text, or one message of the assistant's")
        completion = turns[0]["content"]
    if not completion.strip():
        raise UsageError("completion: is empty")
    return prompt, completion


def _messages(value: Any, column: str) -> list[Message]:
    wrong = f"{column}: not a list of messages with role and content"
    if not isinstance(value, list) or not value:
        raise UsageError(wrong)
    for message in value:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise UsageError(wrong)
    return list(value)


def untagged(text: str, language: str) -> str:
    """A text without the tags of its language: what an autoregressive model would be shown."""
    if language == PLAIN:
        return text
    return re.sub("|".join(map(re.escape, PROTOCOLS[language].tags)), "", text)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line of a file that is not blank.

    Raises:
        UsageError: the file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error


def record_of(line: str) -> Mapping[str, Any]:
    """The record in a line of JSONL.

    Raises:
        UsageError: it is no JSON object.
    """
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UsageError("not a JSON object")
    return value


def read_records(path: str, split: str = "train", revision: str | None = None) -> Sequence[Mapping[str, Any]]:
    """All rows of a JSONL or parquet file, a folder written by `datasets`, or a Hugging Face data set.

    Raises:
        UsageError: it cannot be read, or a Hugging Face id comes without the commit that is meant.
    """
    place = Path(path).expanduser()
    if place.suffix in (".jsonl", ".json"):
        return [_told(path, number, line) for number, line in read_lines(place)]
    import datasets

    try:
        if place.suffix == ".parquet":
            return _rows(datasets.Dataset.from_parquet(str(place)))
        if (place / "dataset_info.json").is_file():
            return _rows(datasets.load_from_disk(str(place)))
        if (place / "dataset_dict.json").is_file():
            return _rows(datasets.load_from_disk(str(place))[split])
        if place.is_dir():
            return _rows(datasets.load_dataset(str(place), split=split))
        if place.exists() or path.count("/") != 1 or path[0] in "./~":
            raise UsageError("it is no .jsonl or .parquet file, no folder of datasets, and no Hugging Face id")
        if revision is None:
            raise UsageError("a Hugging Face data set needs its revision: a commit, so that the run can be repeated")
        return _rows(datasets.load_dataset(path, split=split, revision=revision))
    except Exception as error:
        line = " ".join(str(error).split())
        raise UsageError(f"cannot load the data {path}: {line[:300]}") from error


def _told(path: str, number: int, line: str) -> Mapping[str, Any]:
    try:
        return record_of(line)
    except UsageError as error:
        raise UsageError(f"{path}, line {number}: {error}") from error


def _rows(dataset: Any) -> Sequence[Mapping[str, Any]]:
    rows: Sequence[Mapping[str, Any]] = dataset
    return rows
