"""PEFT adapters: a model with one merged says what peft's own forward says."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from engines import opened

from orchestra.errors import MissingExtraError, UsageError
from orchestra.graph import ThreadGraph
from orchestra.runtime.connect import open_engine
from orchestra.runtime.local.model import load_model, load_plain
from orchestra.testing import check_greedy, check_parity, random_graph
from orchestra.testing.laws import row_logits

peft = pytest.importorskip("peft")

LORA = peft.LoraConfig(
    r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """A LoRA adapter for the tiny Llama, with random weights in both its matrices."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    peft.get_peft_model(load_plain(tiny), LORA).save_pretrained(folder)
    return str(folder)


def by_peft(tiny, adapter):
    return peft.PeftModel.from_pretrained(load_plain(tiny), adapter).eval()


@pytest.mark.parametrize("url", ["local:{adapter}", "local:{tiny}?adapter={adapter}"])
def test_the_laws_hold_against_pefts_own_forward(tiny, adapter, url):
    async def main():
        engine = open_engine(url.format(tiny=tiny, adapter=adapter))
        try:
            plain = engine.plain_model()
            unmerged = by_peft(tiny, adapter)
            for seed in range(2):
                graph = await random_graph(engine, seed)
                await check_parity(engine, graph, unmerged)
                await check_parity(engine, graph, plain)
                with pytest.raises(AssertionError, match="one forward gives"):
                    await check_parity(engine, graph, load_plain(tiny))
                await engine.release(graph)
            await check_greedy(engine, "the answer is", 16, unmerged)
            return engine.name, engine.facts()
        finally:
            await engine.close()

    name, facts = asyncio.run(main())
    assert name == url.format(tiny=tiny, adapter=adapter)
    assert facts["model"] == name.removeprefix("local:")
    assert facts["fingerprint"] != load_model(tiny, "float32", "cpu").fingerprint()


def test_nothing_of_the_adapter_is_left_to_run(tiny, adapter):
    model, base = load_model(adapter, "float32", "cpu"), load_model(tiny, "float32", "cpu")
    assert [type(a) for a in model.module.modules()] == [type(a) for a in base.module.modules()]
    assert model.tokenizer.get_vocab() == base.tokenizer.get_vocab()


def test_in_bfloat16(tiny, adapter):
    """Rounding of merged weights, beside that of peft's two products."""

    async def main():
        async with opened(adapter) as engine:
            return await random_graph(engine, 1)

    graph: ThreadGraph = asyncio.run(main())
    exact = row_logits(by_peft(tiny, adapter), graph)
    merged = row_logits(load_plain(adapter, "bfloat16"), graph)
    unmerged = row_logits(peft.PeftModel.from_pretrained(load_plain(tiny, "bfloat16"), adapter).eval(), graph)
    assert float((merged - exact).norm()) <= 2 * float((unmerged - exact).norm())


def test_tokens_that_training_added(tiny, tmp_path):
    """The adapter brings its own tokenizer, and rows of the embeddings for its tokens."""
    tokenizer = byte_tokenizer(tags=True)
    base = load_plain(tiny)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tuned = peft.get_peft_model(base, LORA)
    tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    tokenizer.save_pretrained(tmp_path)
    tokens = torch.tensor([[1, *tokenizer.convert_tokens_to_ids(["<Goal>", "</Path>"]), 40]])
    with torch.inference_mode():
        logits = load_plain(str(tmp_path))(tokens).logits
        torch.testing.assert_close(logits, tuned.eval()(tokens).logits, rtol=1e-4, atol=1e-4)
    model = load_model(str(tmp_path), "float32", "cpu")
    assert model.tokenizer.convert_tokens_to_ids("<Goal>") == len(tokenizer) - 5


def test_errors_are_one_clear_line(tiny, adapter, tmp_path, monkeypatch):
    def message(source, other=None):
        with pytest.raises(UsageError) as caught:
            load_model(source, "float32", "cpu", other)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "is not an adapter folder" in message(tiny, tiny)
    assert "is an adapter itself" in message(adapter, adapter)
    moved = Path(shutil.copytree(adapter, tmp_path / "moved"))
    config = json.loads((moved / "adapter_config.json").read_text())

    def write(**changes):
        (moved / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    write(base_model_name_or_path="/nowhere/model")
    assert (
        f"belongs to /nowhere/model, which is not here; name its base model yourself: local:MODEL?adapter={moved}"
        in (message(str(moved)))
    )
    assert load_model(tiny, "float32", "cpu", str(moved)).rotary is not None
    write(base_model_name_or_path=None)
    assert "names no base model" in message(str(moved))
    (moved / "adapter_config.json").write_text("{")
    assert "cannot read" in message(str(moved))
    write(r=8)
    assert f"cannot load {moved}" in message(str(moved))
    prompts = tmp_path / "prompts"
    kind = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_plain(tiny), kind).save_pretrained(prompts)
    assert "PROMPT_TUNING" in message(str(prompts))
    monkeypatch.setattr("orchestra.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"orchestra-lm\[train\]"):
        load_model(adapter, "float32", "cpu")
