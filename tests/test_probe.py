"""A model that the plan would run wrongly is refused when it is loaded, by name and with the reason."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES
from conftest import save_model

from orchestra.errors import UsageError
from orchestra.runtime.attention.plan import Plan
from orchestra.runtime.local.model import load_model

SMALL = {"sliding_window": 6, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}


def refused(folder, dtype="float32"):
    with pytest.raises(UsageError) as caught:
        load_model(folder, dtype, "cpu")
    assert "\n" not in str(caught.value)
    assert "the in-process engine cannot run" in str(caught.value)
    return str(caught.value)


def sabotaged(monkeypatch, change):
    """Plans whose `run` is given other options."""
    true = Plan.run

    def run(self, *arguments, **options):
        return true(self, *arguments, **{**options, **change(options)})

    monkeypatch.setattr(Plan, "run", run)


def wider(options):
    return {"window": options["window"] and options["window"] + 1}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral, window", lambda options: {"window": None}),
        ("mistral, window", wider),
        ("gemma3_text", wider),
        ("gemma2", lambda options: {"softcap": None}),
        ("gemma2", lambda options: {"window": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_that_is_not_the_models_own(make_model, monkeypatch, name, change, dtype):
    kind, options = ARCHITECTURES[name]
    folder = make_model(kind, **options)
    load_model(folder, dtype, "cpu")
    sabotaged(monkeypatch, change)
    assert "not what the plan gives" in refused(folder, dtype)


@pytest.fixture
def unrefused(monkeypatch):
    """Nothing is refused by its configuration."""
    monkeypatch.setattr("orchestra.runtime.local.model.refusal", lambda config: None)


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True, **SMALL}, "not what the plan gives"),
        ("gpt_oss", EXPERTS, "s_aux"),
        ("llama4_text", {**EXPERTS, "attention_chunk_size": 3, "no_rope_layers": [1, 1]}, "not what the plan gives"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "attention ran in 1 of 2 layers"),
        (
            "gemma4_text",
            {"global_head_dim": 16, "sliding_window": 6, "vocab_size_per_layer_input": 267},
            "keys of different sizes",
        ),
        ("doge", {}, "brings a mask"),
        ("nemotron", {}, "does not use the attention interface"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_configuration_does_not_tell(tmp_path, unrefused, kind, options, reason):
    assert reason in refused(save_model(tmp_path, kind, **options))


def test_tokens_that_mix_outside_attention(tiny, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaMLP

    true = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: true(self, x + 0.1 * x.roll(1, 1)))
    assert "by other ways than attention" in refused(tiny)


def test_the_model_is_left_as_it_was(make_model):
    kind, options = ARCHITECTURES["gemma3_text"]
    model = load_model(make_model(kind, **options), "float32", "cpu")
    config = model.module.config
    assert (config.sliding_window, config._attn_implementation) == (options["sliding_window"], "orchestra_segments")
    assert model.memory.windows
    assert model.memory.bytes == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "qwen3, windows", "cohere2", "glm4", "stablelm"])
def test_rounding_is_no_reason(make_model, name, dtype):
    kind, options = ARCHITECTURES[name]
    model = load_model(make_model(kind, **options), dtype, "cpu")
    assert model.module.lm_head.weight.dtype == getattr(torch, dtype)
    assert model.rotary is not None
