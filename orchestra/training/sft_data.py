"""What a supervised run is trained on: its batches, its steps, and what it is held against."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from orchestra.errors import UsageError, one_of
from orchestra.protocols import PROTOCOLS
from orchestra.training import tokenizer as words
from orchestra.training.arguments import processes
from orchestra.training.batches import RowBatches, Schedule, hold_out
from orchestra.training.flatten import Row
from orchestra.training.mixture import WEIGHTS, Mixture, Weights
from orchestra.training.multilingual import Languages
from orchestra.training.sft_config import SupervisedConfig
from orchestra.training.text_rows import load_rows
from orchestra.training.texts import PLAIN
from orchestra.training.trainer import Batches


class Data(NamedTuple):
    """What a run is trained on, for how many steps, and the batches for its evaluation loss."""

    batches: Batches
    steps: int
    held_out: list[list[Row]]


def load_data(config: SupervisedConfig, tokenizer: Any, parts: int = 1) -> Data:
    """What the configuration asks for.

    Args:
        config: of the run.
        tokenizer: of the model, with its tags.
        parts: that a batch is shared out in.

    Raises:
        UsageError: there is no data, or not as many steps or rows as it takes.
    """
    if bool(config.sources) == (config.mixture is not None):
        raise UsageError("data: or mixture:, one of them, says what to learn from")
    if (config.steps is None) == (config.epochs is None):
        raise UsageError("steps: or epochs:, one of them, says how long")
    if config.mixture is not None:
        if not words.vocabulary().items() <= tokenizer.get_vocab().items():
            raise UsageError("mixture: is in the words of the embedded model, and this model's are others")
        if config.steps is None:
            raise UsageError("a mixture has no epochs: give steps")
        return Data(_mixture(config), config.steps, [])
    if config.language != PLAIN and config.language not in PROTOCOLS:
        raise UsageError(one_of("language", config.language, [*PROTOCOLS, PLAIN]))
    if config.batch < parts:
        raise UsageError(f"batch: {config.batch} rows are fewer than the {parts} parts of processes and accumulation")
    cache = Path(config.output) / "rows"
    with processes().main_process_first():
        sources = [load_rows(source, tokenizer, config, cache) for source in config.sources]
    try:
        sources, rows = hold_out(sources, config.held_out, config.seed)
    except ValueError as error:
        raise UsageError(str(error)) from error
    size = max(1, config.batch // parts)
    held_out = [rows[first : first + size] for first in range(0, len(rows), size)]

    def batches(steps: int) -> RowBatches:
        schedule = Schedule(*config.parallel, steps)
        return RowBatches(sources, config.batch, config.seed, shuffle=config.shuffle, schedule=schedule)

    steps = config.steps or math.ceil((config.epochs or 0) * batches(1).epoch / config.batch)
    return Data(batches(steps), steps, held_out)


def _mixture(config: SupervisedConfig) -> Mixture | Languages:
    options = dict(config.mixture or {})
    languages = options.pop("languages", None)
    weights = {name: options.pop(f"{name}_weight") for name in WEIGHTS if f"{name}_weight" in options}
    seed = config.seed if languages is None else config.seed + 1  # not what a first stage has seen
    try:
        made = Mixture(seed, weights=Weights(**weights), longest=config.longest, **options)
        return made if languages is None else Languages(made, config.seed, **languages)
    except TypeError as error:
        raise UsageError(f"mixture: {error}") from error
