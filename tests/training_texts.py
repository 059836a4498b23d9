"""Texts to train on, and the smallest runs on them: what the tests of supervised training share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import byte_tokenizer

from orchestra.training.sft_config import SupervisedConfig

MAPPED = (
    "Two ways.<Parallel><Goal>both<Outline>1: up</Outline><Outline>2: down</Outline></Goal><Path>\n1: it goes up</Path>"
    "<Path>\n2: down it falls far</Path><Conclusion>either way</Conclusion></Parallel> So 7."
)
NESTED = (
    "<Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal><Path>\n1: in <Parallel><Goal><Outline>1.1: c"
    "</Outline><Outline>1.2: d</Outline></Goal><Path>\n1.1: cc</Path><Path>\n1.2: d</Path><Conclusion>e</Conclusion>"
    "</Parallel> f</Path><Path>\n2: bbb</Path><Conclusion>g</Conclusion></Parallel> 3."
)
WOVEN = (
    "Hm.<Parallel>\n<Outlines>\n<Outline>1: x</Outline>\n<Outline>2: y</Outline>\n</Outlines>\n"
    "<Thread>\n1: one is x</Thread><Thread>\n2: y too</Thread>\n</Parallel> 5."
)
TALKED = "Ask. <FORK-1>what?</FORK-1> Wait. <JOIN-1><RETURN-1>that</RETURN-1> So that."
RECORDS: list[dict[str, Any]] = [
    {"prompt": "Go? ", "completion": MAPPED, "language": "multiverse"},
    {"prompt": "In? ", "completion": NESTED, "language": "multiverse"},
    {"prompt": "Hm? ", "completion": WOVEN, "language": "thread_weaver"},
    {"prompt": "Q? ", "completion": TALKED, "language": "async_think", "workers": ["It is <RETURN>that</RETURN>"]},
    {"prompt": "No? ", "completion": "Not now.", "language": "plain"},
]
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}


def folder_of(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    """A folder with a tokenizer of bytes (`words`) and texts (`data.jsonl`)."""
    path.mkdir(exist_ok=True)
    byte_tokenizer(merges=False).save_pretrained(path / "words")
    lines = RECORDS if records is None else records
    (path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
    return path


def config_of(folder: Path, output: str = "run", **changes: Any) -> SupervisedConfig:
    """A run on the texts of a folder; seconds, unless it is changed."""
    options: dict[str, Any] = {
        "output": str(folder / output),
        "model": MODEL,
        "tokenizer": str(folder / "words"),
        "data": str(folder / "data.jsonl"),
        "tags": ["multiverse", "thread_weaver"],
        "steps": 6,
        "batch": 4,
        "learning_rate": 5e-3,
        "log_every": 1,
        "save_every": 3,
    }
    return SupervisedConfig(**options | changes)


def log(output: Path) -> list[dict[str, Any]]:
    """The log of a run."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    """The training losses in it."""
    return [line["loss"] for line in log(output) if "loss" in line]
