"""What a recycled model is trained on and held against: rows of token ids and loss weights, in batches by step."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from orchestra.errors import UsageError
from orchestra.evaluation.countdown import LEVELS
from orchestra.training import tokenizer as words
from orchestra.training.config import ParScaleConfig
from orchestra.training.flatten import Row
from orchestra.training.mixture import Mixture, cut
from orchestra.training.trainer import Batches

COLUMNS = "a column text, messages, or prompt and completion"


class Data(NamedTuple):
    """Training batches, and batches that are not trained on."""

    training: Batches
    held_out: list[list[Row]]


class Texts:
    """Batches of like length, all of them once an epoch, in an order of its own each."""

    def __init__(self, rows: Sequence[Row], tokens: int, seed: int) -> None:
        self._batches, self._seed = cut(rows, tokens), seed
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> list[Row]:
        """The batch of one optimiser step."""
        epoch, place = divmod(step, len(self._batches))
        return self._batches[self._order(epoch)[place]]

    def _shuffled(self, epoch: int) -> list[int]:
        order = list(range(len(self._batches)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order


def load_data(config: ParScaleConfig, tokenizer: Any) -> Data:
    """What the configuration asks for.

    Raises:
        UsageError: there is no such data, it has no column that can be learned from, or too few rows.
    """
    if config.data == "countdown":
        return _countdown(config, tokenizer)
    rows = [row(record, tokenizer, config.longest) for record in _records(config)]
    rows = [
        made for made in rows if any(made.weights[1:])
    ]  # others have nothing to predict, such as a prompt cut short
    if len(rows) <= config.held_out:
        raise UsageError(f"{config.data} has {len(rows)} rows to learn from: too few to hold {config.held_out} out")
    random.Random(config.seed).shuffle(rows)
    held_out = cut(rows[: config.held_out], config.batch_tokens)
    return Data(Texts(rows[config.held_out :], config.batch_tokens, config.seed), held_out)


def row(record: Mapping[str, Any], tokenizer: Any, longest: int) -> Row:
    """One training sequence: a text or conversation, all of it learned; or a prompt, and a completion to learn.

    Args:
        record: a row of the data set.
        tokenizer: of Hugging Face; conversations go through its chat template.
        longest: what goes beyond is cut off.

    Raises:
        UsageError: the record has none of the columns.
    """
    if isinstance(text := record.get("text"), str):
        given, ids = 0, [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    elif record.get("messages"):
        given, ids = 0, _chat(tokenizer, record["messages"])
    elif isinstance(prompt := record.get("prompt"), str) and isinstance(completion := record.get("completion"), str):
        before = tokenizer(prompt)["input_ids"]
        learned = tokenizer(completion, add_special_tokens=False)["input_ids"]
        given, ids = len(before), [*before, *learned, tokenizer.eos_token_id]
    elif record.get("prompt") and record.get("completion"):
        before = _chat(tokenizer, record["prompt"], add_generation_prompt=True)
        ids = _chat(tokenizer, [*record["prompt"], *record["completion"]])
        given = next((i for i, (one, two) in enumerate(zip(before, ids, strict=False)) if one != two), len(before))
    else:
        raise UsageError(f"the data needs {COLUMNS}; this row has {', '.join(record) or 'none'}")
    ids = [token for token in ids if token is not None][:longest]  # not every tokenizer has an end token
    return Row.sequence(ids, [0.0] * min(given, len(ids)) + [1.0] * (len(ids) - given))


def _chat(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise UsageError("the data holds conversations, and the tokenizer has no chat template")
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


def _records(config: ParScaleConfig) -> list[Mapping[str, Any]]:
    path = Path(config.data).expanduser()
    try:
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        import datasets

        if (path / "dataset_info.json").is_file():
            return list(datasets.load_from_disk(str(path)))
        return list(datasets.load_dataset(config.data, split=config.split))
    except Exception as error:
        line = " ".join(str(error).split())
        raise UsageError(f"cannot load the data {config.data}: {line[:300]}") from error


def _countdown(config: ParScaleConfig, tokenizer: Any) -> Data:
    if not words.vocabulary().items() <= tokenizer.get_vocab().items():
        raise UsageError("data: countdown is in the words of the embedded model, and this backbone's are others")
    if unknown := sorted(set(config.levels) - set(LEVELS)):
        raise UsageError(f"unknown Countdown level {unknown[0]!r}: choose from {', '.join(LEVELS)}")
    made = Mixture(config.seed, config.batch_tokens, config.levels, longest=config.longest)
    # The held-out rows are those of every seed.
    dev = Mixture(0, config.batch_tokens, config.levels, longest=config.longest, split="dev")
    held_out: list[list[Row]] = []
    while sum(map(len, held_out)) < config.held_out:
        held_out.append(dev.batch(len(held_out)))
    return Data(made, held_out)
