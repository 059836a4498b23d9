"""The multilingual model's training: batches by step alone, old words untouched by new ones, a run that ends."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

import orchestra
from orchestra.runtime.openings import openings_in
from orchestra.training import tokenizer
from orchestra.training.mixture import Mixture
from orchestra.training.multilingual import CYCLE, NEW, Languages, grow
from orchestra.training.parallel_demonstrations import OPENINGS
from orchestra.training.sft import build_model, train_sft
from orchestra.training.sft_config import SupervisedConfig, load_config
from orchestra.training.sft_data import load_data

ROOT = Path(__file__).parent.parent
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
CONCLUSION = tokenizer.IDS["<Conclusion>"]


def batches(seed: int = 1, tokens: int = 1500) -> Languages:
    levels = {"small": 0.5, "hard": 0.5}
    return Languages(Mixture(seed, tokens, levels), seed, levels, 1400)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, other = batches(), batches()
    steps = [CYCLE.index(kind) for kind in (*NEW, "three")]
    later = [one.batch(step) for step in steps]
    assert [other.batch(step) for step in reversed(steps)] == later[::-1]
    assert batches(seed=2).batch(steps[0]) != later[0]
    for step, rows in zip(steps, later, strict=True):
        assert max(map(len, rows)) * (len(rows) - 0.5) <= 1500
        assert all(row.plain for row in rows) == (CYCLE[step] in ("three", "refine"))
        assert all(any(row.weights) for row in rows)


def test_new_rows_of_the_vocabulary_leave_the_old_ones_alone() -> None:
    words = tokenizer.build()
    config = SupervisedConfig(model={"model_type": "llama", **SMALL})
    model, ids = build_model(config, words), torch.tensor([[1, 16, 27, 31, 32, 36, 17, 78]])
    old = model(ids).logits
    grow(model, seed=1)
    new = model(ids).logits
    assert new.shape[-1] == len(tokenizer.IDS) == model.config.vocab_size
    torch.testing.assert_close(new[..., : old.shape[-1]], old)
    again = build_model(config, words)
    grow(again, seed=1)
    torch.testing.assert_close(again.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)
    table = model.model.embed_tokens.weight[old.shape[-1] :].detach()
    assert float(torch.cdist(table, table).fill_diagonal_(1).min()) > 0.01  # no two new words are the same


@pytest.mark.slow
def test_the_smoke_configuration_trains_a_model_that_says_what_it_speaks(tmp_path: Path) -> None:
    model, output = ROOT / "orchestra" / "assets" / "embedded", tmp_path / "run"
    config = load_config(ROOT / "configs" / "multilingual-smoke.yaml", [f"output={output}", f"model={model}"])
    final = train_sft(config)
    assert openings_in(str(final)).items() >= OPENINGS.items()
    assert LlamaForCausalLM.from_pretrained(final).config.vocab_size == len(AutoTokenizer.from_pretrained(final))
    outcome = orchestra.run("threads", "numbers: 3 7 8 12 target: 54", engine=f"local:{final}", max_tokens=40)
    assert outcome.text.startswith(OPENINGS["thread_weaver"])


@pytest.mark.parametrize("name", ["multilingual", "multilingual-choice"])
def test_the_committed_configurations_make_batches(name: str) -> None:
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    data = load_data(config, tokenizer.multilingual())
    assert isinstance(data.batches, Languages)
    rows = data.batches.batch(CYCLE.index("map_reduce"))
    choices = {row.weights[i + 2] for row in rows for i in range(len(row) - 2) if row.tokens[i] == CONCLUSION}
    assert choices == {data.batches.old.weights.choice} == {4.0 if name == "multilingual" else 40.0}
