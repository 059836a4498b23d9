"""Tasks: a folder with `task.yaml`, bound to the code that makes, reads and grades its items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import orchestra
from orchestra.errors import UsageError, one_of


class TaskFile(BaseModel):
    """What `task.yaml` says.

    Attributes:
        name: the folder's name.
        description: one line for `orchestra tasks`.
        citation: where the task comes from.
        levels: difficulties, the default first.
        splits: sets of items that share none, the default first.
        items: how many items an evaluation takes without `--limit`.
        seed: of the generator; the same items on every machine.
        repeats: samples an item without `--repeats`.
        max_tokens: most tokens a generation without `--max-tokens`.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str
    citation: str = ""
    levels: list[str] = Field(min_length=1)
    splits: list[str] = Field(min_length=1)
    items: int = Field(ge=1)
    seed: int = 0
    repeats: int = Field(1, ge=1)
    max_tokens: int | None = Field(None, ge=1)


@dataclass(frozen=True, slots=True)
class Item:
    """One problem.

    Attributes:
        id: the same on every machine and in every run.
        prompt: what the strategy is given.
        reference: what grading needs to know.
    """

    id: str
    prompt: str
    reference: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A task at one level and split.

    Attributes:
        file: its `task.yaml`.
        parameters: what determines the items, for the manifest.
        make: `make(count)` gives the first `count` items; more of them begin with the same ones.
        extract: the answer in a response, None if there is none.
        grade: whether an answer is correct; None when it could not be graded, which is not the same as wrong.
    """

    file: TaskFile
    parameters: Mapping[str, Any]
    make: Callable[[int], list[Item]]
    extract: Callable[[str], str | None]
    grade: Callable[[Item, str | None], bool | None]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.file.name

    def items(self, limit: int | None = None) -> list[Item]:
        """The first `limit` items, or as many as the task's file says.

        Raises:
            UsageError: there are fewer.
        """
        try:
            return self.make(self.file.items if limit is None else limit)
        except ValueError as error:
            raise UsageError(f"{self.name}: {error}") from error


def tasks_folder() -> Path:
    """The folder of task folders: in the wheel beside the package's modules, in a clone at its root."""
    package = Path(orchestra.__file__).parent
    shipped = package / "_tasks"
    return shipped if shipped.is_dir() else package.parent / "tasks"


def task_files() -> dict[str, TaskFile]:
    """All tasks by name."""
    return {path.parent.name: _read(path) for path in sorted(tasks_folder().glob("*/task.yaml"))}


def load_task(name: str, *, level: str | None = None, split: str | None = None) -> Task:
    """The task `name` at a level and split (default: the first ones of its file).

    Raises:
        UsageError: unknown task, level or split; lists the right ones.
    """
    known = {path.parent.name: path for path in tasks_folder().glob("*/task.yaml")}
    if name not in known or name not in _CODE:
        raise UsageError(one_of("task", name, known.keys() & _CODE.keys()))
    file = _read(known[name])
    level = file.levels[0] if level is None else level
    split = file.splits[0] if split is None else split
    if level not in file.levels:
        raise UsageError(f"{name}: {one_of('level', level, file.levels)}")
    if split not in file.splits:
        raise UsageError(f"{name}: {one_of('split', split, file.splits)}")
    return _CODE[name](file, level, split)


def _read(path: Path) -> TaskFile:
    try:
        return TaskFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{path}: {'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}") from error


def _countdown(file: TaskFile, level: str, split: str) -> Task:
    from orchestra.evaluation import countdown
    from orchestra.evaluation.countdown_check import check, extract_answer

    # load_task has checked the split against the file; `train` is not one of its splits.
    chosen: Literal["dev", "test"] = "dev" if split == "dev" else "test"

    def make(count: int) -> list[Item]:
        return [
            Item(instance.id, instance.prompt, {"numbers": instance.numbers, "target": instance.target})
            for instance in countdown.generate(level, chosen, count, file.seed)
        ]

    def grade(item: Item, answer: str | None) -> bool:
        return answer is not None and check(item.reference["numbers"], item.reference["target"], answer)

    return Task(file, {"level": level, "split": split, "items_seed": file.seed}, make, extract_answer, grade)


_CODE: dict[str, Callable[[TaskFile, str, str], Task]] = {"countdown": _countdown}
