"""Generated training data: demonstrations of symbolic solvers as rows of a data set, with the texts beside them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from orchestra.errors import UsageError
from orchestra.evaluation.countdown import LEVELS, stream
from orchestra.runtime.local.prompts import Prompts
from orchestra.training import apr_search, arithmetic, text_tokenizer
from orchestra.training.flatten import Row, flatten
from orchestra.training.graphs import graph_of
from orchestra.training.mixture import Weights
from orchestra.training.multilingual import row_of
from orchestra.training.parallel_demonstrations import BEHAVIOURS

Solver = Callable[[apr_search.Problem, random.Random], apr_search.Trace]
SOLVERS: Mapping[str, Solver] = {"apr": apr_search.apr, "sos": apr_search.serial}
TASKS: Mapping[str, Sequence[str]] = {
    "countdown": tuple(BEHAVIOURS),
    "apr": tuple(SOLVERS),
    "arithmetic": tuple(arithmetic.LANGUAGES),
}
"""What there is, with its behaviours."""
HELPERS = {"apr": "children", "async_think": "workers"}
"""Languages with helpers, and the column of their texts."""
_ANY_LENGTH = 1 << 30

Example = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What to make.

    Attributes:
        task: a key of `TASKS`.
        rows: how many.
        seed: fixes them.
        behaviours: some of the task's, in turn; none: all.
        level: of Countdown.
        model: whose tokenizer, a folder or an id; empty: the embedded model's for Countdown, else `text_tokenizer`.
    """

    task: str
    rows: int = 1000
    seed: int = 0
    behaviours: tuple[str, ...] = ()
    level: str = "hard"
    model: str = ""

    def check(self) -> None:
        """Raises `UsageError` if there is no such thing."""
        if self.task not in TASKS:
            raise UsageError(f"unknown task {self.task!r} (known: {', '.join(TASKS)}, or the folder of a run)")
        if unknown := [name for name in self.behaviours if name not in TASKS[self.task]]:
            known = ", ".join(TASKS[self.task])
            raise UsageError(f"unknown behaviour {unknown[0]!r} of {self.task} (known: {known})")
        if self.task == "countdown" and self.level not in LEVELS:
            raise UsageError(f"unknown Countdown level {self.level!r} (known: {', '.join(LEVELS)})")
        if self.rows < 1:
            raise UsageError(f"rows must be at least 1, got {self.rows}")


def make(wanted: Wanted, out: Path, command: str = "") -> Counter[str]:
    """Write a data set with a card, and its tokenizer if it is not a model's.

    Returns:
        Rows by behaviour.

    Raises:
        UsageError: there is no such task, behaviour, level or model, or `out` is there already.
    """
    import datasets

    wanted.check()
    if out.exists():
        raise UsageError(f"{out} is there already")
    examples = list(islice(_examples(wanted, _tokenizer(wanted, out)), wanted.rows))
    names = dict.fromkeys(name for example in examples for name in example)
    columns = {name: [example.get(name) for example in examples] for name in names}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(columns).save_to_disk(str(out))
    (out / "README.md").write_text(card(wanted, examples, command), encoding="utf-8")
    return Counter(example["behaviour"] for example in examples)


def _tokenizer(wanted: Wanted, out: Path) -> Any:
    """The tokenizer of a model, or None for the embedded one's words; of generated texts it is written to `out`."""
    if wanted.model:
        from orchestra.runtime.local.sources import load_tokenizer

        return load_tokenizer(wanted.model)
    if wanted.task == "countdown":
        return None
    tokenizer = text_tokenizer.build(_ANY_LENGTH)
    tokenizer.save_pretrained(str(out / "tokenizer"))
    return tokenizer


def _examples(wanted: Wanted, tokenizer: Any) -> Iterator[Example]:
    rng = random.Random(f"made/{wanted.task}/{wanted.level}/{wanted.seed}")
    behaviours = wanted.behaviours or tuple(TASKS[wanted.task])
    if wanted.task == "countdown":
        return countdown(rng, behaviours, wanted.level, tokenizer)
    return apr(rng, behaviours, tokenizer) if wanted.task == "apr" else sums(rng, behaviours, tokenizer)


def countdown(rng: random.Random, behaviours: Sequence[str], level: str, tokenizer: Any = None) -> Iterator[Example]:
    """Countdown problems of the train split; without a tokenizer in the embedded model's tokens and loss weights."""
    for number, instance in enumerate(stream(level, "train", rng)):
        behaviour = behaviours[number % len(behaviours)]
        told = BEHAVIOURS[behaviour](instance, rng)
        if tokenizer is None:
            row = row_of(told, Weights())
        else:
            row = _row(told.prompt, told.text, told.language, tokenizer, told.branches)
        example = _texts(behaviour, told.prompt, told.text, told.language, told.branches)
        yield example | {
            "level": level,
            "numbers": list(instance.numbers),
            "target": instance.target,
            "solved": told.solved,
            **row.columns(),
        }


def apr(rng: random.Random, behaviours: Sequence[str], tokenizer: Any) -> Iterator[Example]:
    """APR's task in its own text: a plain sequence for each call, of which all is learned, as it was published."""
    for number, problem in enumerate(apr_search.problems(rng)):
        arm = behaviours[number % len(behaviours)]
        trace = SOLVERS[arm](problem, rng)
        for place, call in enumerate(trace.calls):
            ids = [*tokenizer(call.prompt + call.completion).input_ids, tokenizer.eos_token_id]
            yield _texts(arm, call.prompt, call.completion, "plain") | {
                "problem": number,
                "call": "main" if place < len(trace.main) else "child",
                "numbers": list(problem.numbers),
                "target": problem.target,
                "solved": trace.solved,
                "input_ids": ids,
            }


def sums(rng: random.Random, behaviours: Sequence[str], tokenizer: Any) -> Iterator[Example]:
    """Sums of products."""
    while True:
        for behaviour in behaviours:
            made = arithmetic.chain(rng, behaviour)
            language = arithmetic.LANGUAGES[behaviour].name
            row = _row(made.prompt, made.text, language, tokenizer)
            yield _texts(behaviour, made.prompt, made.text, language) | {"answer": made.answer, **row.columns()}


def _texts(behaviour: str, prompt: str, text: str, language: str, helpers: Sequence[str] = ()) -> Example:
    """The columns of text, as `orchestra data check` reads them."""
    example: Example = {"behaviour": behaviour, "prompt": prompt, "completion": text, "language": language}
    return example | {HELPERS[language]: list(helpers)} if language in HELPERS else example


def _row(prompt: str, text: str, language: str, tokenizer: Any, branches: Sequence[str] = ()) -> Row:
    encoder = Prompts(tokenizer, _ANY_LENGTH)
    return flatten(graph_of(prompt, text, language, encoder, tokenizer.eos_token_id, branches=branches))


def card(wanted: Wanted, examples: Sequence[Example], command: str = "") -> str:
    """The README of a data set."""
    title = f"# Demonstrations: {wanted.task}" + (f" ({wanted.level})" if wanted.task == "countdown" else "")
    source = wanted.model or ("the embedded model's" if wanted.task == "countdown" else "the one in `tokenizer/`")
    lines = [
        title,
        "",
        "Generated by symbolic solvers: texts, and training rows as `orchestra.training.Row.from_columns` reads them.",
        f"Tokenizer: {source}. Seed {wanted.seed}. Columns are explained in docs/data.md.",
        "",
        "| behaviour | rows | solved, % | tokens, mean | longest | learned, % |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for behaviour in dict.fromkeys(example["behaviour"] for example in examples):
        rows = [example for example in examples if example["behaviour"] == behaviour]
        sizes = [len(row["input_ids"]) for row in rows]
        learned = sum(weight > 0 for row in rows for weight in row.get("loss_weights", row["input_ids"][1:]))
        solved = 100 * sum(bool(row.get("solved", True)) for row in rows) / len(rows)
        lines.append(
            f"| {behaviour} | {len(rows):,} | {solved:.1f} | {sum(sizes) / len(rows):,.0f} | {max(sizes):,} "
            f"| {100 * learned / sum(sizes):.0f} |"
        )
    return "\n".join([*lines, *(["", "```bash", command, "```"] if command else [])]) + "\n"
