"""The training path: a smoke run learns something, weights reach the loss, a resumed run is the same run."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from orchestra.training import sft, tokenizer  # noqa: E402
from orchestra.training.collate import GraphCollator  # noqa: E402
from orchestra.training.flatten import Row  # noqa: E402
from orchestra.training.trainer import WeightedSFTTrainer  # noqa: E402

CONFIG = Path(__file__).parents[1] / "configs" / "smoke.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smoke")
    sft.train_sft(sft.load_config(CONFIG, [f"output={output}"]))
    return output


def test_the_loss_falls_and_the_model_loads(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert "hit_accuracy" in log[0]
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    ids = AutoTokenizer.from_pretrained(run / "final")(" numbers: 3 7 8 12 target: 54", return_tensors="pt").input_ids
    assert model(ids).logits.shape == (1, 8, len(tokenizer.vocabulary()))


def test_a_resumed_run_ends_in_the_same_weights(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(run / "checkpoint-15", tmp_path / "checkpoint-15")
    resumed = sft.train_sft(sft.load_config(CONFIG, [f"output={tmp_path}"]), resume=True)
    first, second = (load_file(folder / "model.safetensors") for folder in (run / "final", resumed))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)


def test_the_loss_is_the_weighted_mean(tmp_path: Path) -> None:
    config = sft.load_config(CONFIG, [f"output={tmp_path}"])
    words = sft.build_tokenizer(config)
    model = sft.build_model(config, words)
    rows = [Row.sequence([1, 20, 30, 40, 2], [0, 0, 1, 6, 4]), Row.sequence([1, 25, 2], [0, 0, 2])]
    trainer = WeightedSFTTrainer(
        batches=Given(rows),
        collator=GraphCollator(tokenizer.PAD),
        model=model,
        args=sft.options(config, 1),
        processing_class=words,
    )
    (inputs,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(model, inputs).detach()
    total = weight = 0.0
    for made in rows:  # one row at a time, without padding
        logs = model(torch.tensor([made.tokens])).logits[0].log_softmax(-1).detach()
        for place in range(1, len(made)):
            total -= made.weights[place] * float(logs[place - 1, made.tokens[place]])
            weight += made.weights[place]
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)


@dataclass
class Given:
    """The same rows at every step."""

    rows: list[Row]

    def batch(self, step: int) -> list[Row]:
        return self.rows


@pytest.mark.parametrize(
    ("override", "message"), [("stepz=3", "unknown key stepz"), ("steps", "key=value"), ("nope: 1", "key=value")]
)
def test_bad_overrides_get_a_clear_line(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sft.load_config(CONFIG, [override])
