"""The Python of docs/training.md runs as it stands, on TRL's own trainer."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from conftest import tiny_model
from rehearsal import tokenizer

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def test_the_collator_works_with_trl_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_model(vocabulary=320).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names = {"MODEL": str(tmp_path / "model"), "OUTPUT": str(tmp_path / "run")}
    exec(compile(code, str(PAGE), "exec"), names)  # our own page
    history = names["trainer"].state.log_history  # type: ignore[attr-defined]  # the page made it
    assert names["trainer"].state.global_step == 2  # type: ignore[attr-defined]
    assert history[-1]["train_loss"] > 1


def test_trl_computes_the_loss_of_the_row(tmp_path: Path) -> None:
    """TRL's own loss on a batch of ours is the mean over what is learned."""
    from test_collate import ROWS
    from trl import SFTConfig, SFTTrainer

    from orchestra.training import GraphCollator, weighted_loss

    torch.manual_seed(0)
    model = tiny_model(vocabulary=64).eval()
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, dataset_kwargs={"skip_prepare_dataset": True}
    )
    from datasets import Dataset

    data = Dataset.from_list([row.columns() for row in ROWS])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer())
    batch = GraphCollator(0, config=model.config, weights=False)([ROWS[0], ROWS[2]])
    labels = batch["labels"]
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch))
        del batch["labels"]
        logits = model(**batch, use_cache=False).logits
    torch.testing.assert_close(theirs, weighted_loss(logits, labels, (labels >= 0).float()))
