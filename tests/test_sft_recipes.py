"""The recipes in configs/: each runs small, nothing downloaded, and its smoke twin is the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from training_texts import losses  # noqa: E402

import orchestra  # noqa: E402
from orchestra.training import sft  # noqa: E402
from orchestra.training.mixture import Mixture  # noqa: E402

ROOT = Path(__file__).parents[1]
SCALE = {
    *("output", "model", "revision", "tokenizer", "data", "attention", "longest", "held_out", "evaluate_every"),
    *("steps", "epochs", "batch", "accumulate", "packing", "learning_rate", "log_every", "save_every", "trainer"),
    *("bf16", "gradient_checkpointing", "beta2", "weight_decay", "warmup_share", "seed"),
}
"""What a smoke run has smaller, or leaves out."""


def recipe(name: str, *overrides: str) -> sft.SupervisedConfig:
    return sft.load_config(ROOT / "configs" / f"{name}.yaml", overrides)


@pytest.mark.parametrize("name", ["countdown-sft", "multiverse-sft", "threadweaver-sft"])
def test_a_smoke_twin_is_the_same_recipe(name: str) -> None:
    real, smoke = vars(recipe(name)), vars(recipe(f"{name}-smoke"))
    assert {key: value for key, value in real.items() if key not in SCALE} == {
        key: value for key, value in smoke.items() if key not in SCALE
    }


@pytest.mark.parametrize(("name", "strategy"), [("multiverse-sft", "map_reduce"), ("threadweaver-sft", "threads")])
def test_a_recipe_runs_small_and_its_model_is_served(
    name: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the data lies beside the recipes
    config = recipe(f"{name}-smoke", f"output={tmp_path}")
    final = sft.train_sft(config)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.5
    outcome = orchestra.run(strategy, "What is 2 * 3?", engine=f"local:{final}", max_tokens=20, temperature=0)
    assert outcome.usage.sampled_tokens


def test_the_countdown_recipe_goes_on_from_the_model_on_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(ROOT)
    source = Mixture(1, 1500, {"small": 0.5, "hard": 0.5}, longest=900)
    rows: list[dict[str, Any]] = [row.columns() for step in range(4) for row in source.batch(step)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "data"))
    changes = (f"data={tmp_path / 'data'}", f"output={tmp_path / 'run'}", "steps=2", "batch=2")
    final = sft.train_sft(recipe("countdown-sft-smoke", *changes))
    assert losses(tmp_path / "run")[0] < 0.5
    outcome = orchestra.run("spawn_join", "numbers: 3 7 8 12 target: 55", engine=f"local:{final}", temperature=0)
    assert outcome.answer
