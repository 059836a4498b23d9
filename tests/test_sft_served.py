"""From texts to a served model: it says what it was shown, as an adapter or merged, trained by one process or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

import yaml  # noqa: E402
from conftest import byte_tokenizer, started, tiny_model  # noqa: E402
from training_texts import MAPPED, MODEL, RECORDS, config_of, folder_of, log, losses  # noqa: E402

import orchestra  # noqa: E402
from orchestra.cli import main  # noqa: E402
from orchestra.graph import ThreadGraph  # noqa: E402
from orchestra.runtime.local.model import load_plain  # noqa: E402
from orchestra.training import sft  # noqa: E402
from orchestra.training.flatten import flatten  # noqa: E402
from orchestra.training.graphs import graph_of  # noqa: E402
from orchestra.training.sft_config import Lora  # noqa: E402


def test_a_demonstration_is_served_token_by_token_as_it_was_shown(tmp_path: Path) -> None:
    from orchestra.runtime.local.prompts import Prompts

    folder = folder_of(tmp_path, [RECORDS[0], RECORDS[4]])
    config = config_of(folder, tags=None, language="multiverse", steps=160, batch=2, save_every=160)
    final = sft.train_sft(config)
    assert losses(folder / "run")[-1] < 0.1
    outcome = orchestra.run("map_reduce", "Go? ", engine=f"local:{final}", temperature=0, max_tokens=200)
    assert outcome.text == MAPPED
    tokenizer = sft.build_tokenizer(config_of(folder, model=str(final), tokenizer=""))
    shown = graph_of("Go? ", MAPPED, "multiverse", Prompts(tokenizer, 1024), tokenizer.eos_token_id)
    assert seen(outcome.graph) == seen(shown)
    assert outcome.usage.critical_path_tokens < outcome.usage.sampled_tokens
    # Paths are as wide as they were shown to be, and a prompt that was shown without tags gets none.
    assert orchestra.run("map_reduce", "No? ", engine=f"local:{final}", temperature=0).text == "Not now."


@pytest.mark.slow
def test_sglang_serves_what_is_joined_as_text(tmp_path: Path) -> None:
    from orchestra.runtime.sglang_server import SGLangServer

    folder = folder_of(tmp_path, [RECORDS[0], RECORDS[2]])
    model = MODEL | {"hidden_size": 64, "head_dim": 16}
    final = sft.train_sft(
        config_of(folder, model=model, steps=200, batch=2, save_every=200, join="recompute", layout="trie")
    )
    with started(SGLangServer, final, tmp_path / "server.log") as server:
        for spec, record in (("map_reduce(join='recompute')", RECORDS[0]), ("threads", RECORDS[2])):
            outcome = orchestra.run(spec, record["prompt"], engine=f"sglang://127.0.0.1:{server.port}", temperature=0)
            assert outcome.text == record["completion"]


def seen(graph: ThreadGraph) -> list[Any]:
    """Of each token its position, and all that it sees: however the graph is cut into nodes."""
    row = flatten(graph)
    entries = list(zip(row.positions, row.tokens, strict=True))
    real = [i for i in range(len(row)) if not row.echoes[i]]
    return sorted((entries[i], sorted(entries[j] for j in real if row.sees(i, j))) for i in real)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def adapters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, an adapter with new tokens on it, and the same run exported as a whole model."""
    folder = folder_of(tmp_path_factory.mktemp("adapters"))
    base = folder / "base"
    tokenizer = byte_tokenizer(merges=False)
    tiny_model(vocabulary=len(tokenizer), tie_word_embeddings=request.param).save_pretrained(base)
    tokenizer.save_pretrained(base)
    places = {"base": base}
    for export in ("adapter", "merged"):
        how: dict[str, Any] = {"lora": Lora(r=4, dropout=0.1), "export": export, "tokenizer": ""}
        how["pad_vocabulary"] = 0 if request.param else 64
        places[export] = sft.train_sft(config_of(folder, export, model=str(base), **how))
    return places


def test_an_adapter_loads_and_equals_the_merged_export(adapters: dict[str, Path]) -> None:
    merged, base = load_plain(str(adapters["merged"])), load_plain(str(adapters["base"]))
    tokens = len(byte_tokenizer(merges=False)) + 14
    ids = torch.randint(3, tokens, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = merged(ids).logits[..., :tokens]
    known = ids.clamp(max=base.config.vocab_size - 1)
    assert not torch.allclose(merged(known).logits[..., : base.config.vocab_size], base(known).logits, atol=1e-2)
    for module in (
        load_plain(str(adapters["adapter"])),
        load_plain(str(adapters["base"]), adapter=str(adapters["adapter"])),
    ):
        torch.testing.assert_close(module(ids).logits[..., :tokens], expected, rtol=0, atol=1e-4)


def padded(model: Path) -> bool:
    return json.loads((model / "config.json").read_text())["vocab_size"] % 64 == 0


def test_the_engine_says_the_same_with_the_adapter_and_merged(adapters: dict[str, Path]) -> None:
    said = []
    for url in (
        f"local:{adapters['merged']}",
        f"local:{adapters['adapter']}",
        f"local:{adapters['base']}?adapter={adapters['adapter']}",
    ):
        outcome = orchestra.run("sample", "Go? ", engine=url, temperature=0, max_tokens=12)
        span = outcome.graph.nodes[-1].spans[-1]
        said.append((span.tokens, span.logprobs))
    for tokens, logprobs in said[1:]:
        assert tokens == said[0][0]
        # What a vocabulary is filled up with has its small share of every distribution; an adapter brings none of it.
        assert logprobs == pytest.approx(said[0][1], abs=1e-2 if padded(adapters["merged"]) else 1e-4)


def test_only_the_adapter_and_the_rows_of_new_tokens_are_trained(adapters: dict[str, Path]) -> None:
    base, merged = load_plain(str(adapters["base"])), load_plain(str(adapters["merged"]))
    known = base.config.vocab_size
    assert torch.equal(merged.model.embed_tokens.weight[:known], base.model.embed_tokens.weight)
    assert torch.equal(merged.model.norm.weight, base.model.norm.weight)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    new = merged.model.embed_tokens.weight[known : known + 10]
    assert (new - new.mean(0)).abs().max() > 1e-3


def test_a_resumed_adapter_is_that_of_the_uninterrupted_run(adapters: dict[str, Path]) -> None:
    from safetensors.torch import load_file

    run = adapters["adapter"].parent
    told = yaml.safe_load((run / "config.yaml").read_text()) | {"output": str(run.parent / "resumed")}
    (run.parent / "c.yaml").write_text(yaml.safe_dump(told))
    config = sft.load_config(run.parent / "c.yaml")
    (run.parent / "resumed").mkdir()
    (run / "checkpoint-3").rename(run.parent / "resumed" / "checkpoint-3")
    resumed = sft.train_sft(config, resume=True)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (adapters["adapter"], resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nested_overrides_reach_the_run(adapters: dict[str, Path], tmp_path: Path) -> None:
    data = str(adapters["base"].parent / "data.jsonl")
    told = {"model": str(adapters["base"]), "data": data, "steps": 1, "batch": 2, "lora": {"r": 8}, "tags": ["<Goal>"]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(told))
    words = ["train", "sft", str(tmp_path / "c.yaml"), f"output={tmp_path / 'run'}", "lora.alpha=3", "weights.a=2e0"]
    assert main(words) == 0
    written = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (8, 3)
    assert sft.load_config(tmp_path / "run" / "config.yaml").weights == {"a": 2.0}
    assert main([*words, "lora.rank=3"]) == 2
    assert main([*words, "batch.size=3"]) == 2


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = folder_of(tmp_path)
    told = {"model": MODEL, "tokenizer": str(folder / "words"), "data": str(folder / "data.jsonl"), "steps": 6}
    told |= {
        "batch": 5,
        "log_every": 1,
        "held_out": 1,
        "evaluate_every": 3,
        "tags": ["multiverse"],
        "learning_rate": 5e-3,
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(told | {"parallel": [0, 1]}))
    launch = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
    sharded = "trainer={fsdp: true, fsdp_config: {cpu_ram_efficient_loading: true}}"
    runs = {"one": ([], []), "two": (launch, []), "sharded": (launch, [sharded])}
    for name, (start, changes) in runs.items():
        words = [*start, "orchestra", "train", "sft", str(folder / "c.yaml"), f"output={folder / name}", *changes]
        done = subprocess.run(
            [sys.executable, "-m", *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert losses(folder / name) == pytest.approx(losses(folder / "one"), abs=2e-5)
        evaluated = [[line["eval_loss"] for line in log(folder / run) if "eval_loss" in line] for run in ("one", name)]
        assert len(evaluated[0]) == 2
        assert evaluated[1] == pytest.approx(evaluated[0], abs=2e-5)
        first, second = (load_file(folder / run / "final" / "model.safetensors") for run in ("one", name))
        assert first.keys() == second.keys()
        assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)
        tokens = [log(folder / run)[-1]["tokens"] for run in ("one", name)]
        assert tokens[1] < tokens[0] if start else tokens[1] == tokens[0]  # a part of each batch
