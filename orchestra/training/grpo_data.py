"""Prompts for reinforcement learning: the train split of a task, or a JSONL file; and how answers are graded."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from orchestra.answers import Extractor, extract_answer
from orchestra.errors import UsageError, one_of
from orchestra.evaluation import countdown
from orchestra.evaluation.tasks import Item, Task, load_task


@dataclass(frozen=True)
class Prompts:
    """What is asked, and what is right.

    Attributes:
        items: the prompts.
        extract: the answer in a response.
        task: the task whose items they are; None for those of a file.
    """

    items: list[Item]
    extract: Extractor = extract_answer
    task: Task | None = None

    def grade(self, item: Item, answer: str | None) -> bool | None:
        """Whether an answer is right: the task's grader, or that it is the item's `answer`, white space aside."""
        if self.task is not None:
            return self.task.grade(item, answer)
        return answer is not None and "".join(answer.split()) == "".join(str(item.reference["answer"]).split())


def prompts(task: str, levels: Mapping[str, float], count: int, seed: int) -> Prompts:
    """Prompts to train on.

    Args:
        task: its name, or a JSONL file.
        levels: of the task, and their shares.
        count: how many; of a file at most.
        seed: fixes them.

    Raises:
        UsageError: no such task, level or file, or a line that is not as it should be.
    """
    if task.endswith((".jsonl", ".json")):
        return Prompts(_read(Path(task), count))
    if task != "countdown":
        raise UsageError(one_of("task with a train split", task, ["countdown"]) + "; or a JSONL file of your own")
    if not levels or not all(share > 0 for share in levels.values()):
        raise UsageError(f"levels are given with shares above 0, such as {{hard: 1.0}}, not {dict(levels)!r}")
    found, whole = [], sum(levels.values())
    for level, share in levels.items():
        try:
            instances = countdown.generate(level, "train", round(count * share / whole), seed)
        except ValueError as error:
            raise UsageError(str(error)) from error
        found += [Item(one.id, one.prompt, {"numbers": one.numbers, "target": one.target}) for one in instances]
    random.Random(seed).shuffle(found)
    graded = load_task("countdown", level=next(iter(levels)))
    return Prompts(found, graded.extract, graded)


def prompt_at(items: Sequence[Item], place: int, seed: int) -> Item:
    """The prompt number `place` of a run: all items in random order, then all in another one, and so on."""
    epoch, index = divmod(place, len(items))
    return items[_order(len(items), f"prompts/{seed}/{epoch}")[index]]


@lru_cache(maxsize=2)
def _order(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _read(path: Path, most: int) -> list[Item]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    items: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or len(items) == most:
            continue
        try:
            row: Any = json.loads(line)
            items.append(Item(str(row.get("id", number)), cast(str, row["prompt"]), {"answer": row["answer"], **row}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path}:{number}: a line has a prompt and an answer: {error!r}") from error
    if not items:
        raise UsageError(f"{path} has no prompts")
    return items
