"""The lean forward: equal to the module's own, used only where it is, on the same weights."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch
from torch import nn

from orchestra.errors import UsageError
from orchestra.runtime.attention.plan import Chunk, Plan, Write
from orchestra.runtime.connect import open_engine
from orchestra.runtime.local import lean
from orchestra.runtime.local.engine import LocalEngine
from orchestra.runtime.local.model import LoadedModel, load_model, load_plain

ROPE = {"rope_theta": 10000.0}
KNOWN = {
    "llama": ("llama", {}),
    "llama with as many key heads": ("llama", {"key_heads": 4}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head tied": ("llama", {"tie_word_embeddings": True}),
    "llama, YaRN": (
        "llama",
        {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "mistral, windows": ("mistral", {"sliding_window": 6}),
    "gemma": ("gemma", {}),
    "phi3": ("phi3", {}),
    "phi3, partial rotary": (
        "phi3",
        {"rope_parameters": {**ROPE, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
}


@pytest.fixture
def folder(request, make_model):
    kind, options = KNOWN[request.param]
    return make_model(kind, **options)


def logits(model: LoadedModel, keep: np.ndarray | None = None) -> torch.Tensor:
    """Of a row of 40 tokens that no check at load has seen."""
    keys, values = (model.memory.allocate(model.memory.heads, 40) for _ in range(2))
    plan = Plan(40, chunks=[Chunk.over(0, 40, keys, values)], writes=[Write(0, 40, keys, values)])
    plan.positions = torch.arange(100, 140)
    tokens = torch.randint(0, 267, (40,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return model.forward(tokens, plan.positions, keep, plan).float()


@pytest.mark.parametrize("folder", KNOWN, indirect=True)
def test_logits_equal_those_of_the_modules_own_forward(folder):
    ours, theirs = (load_model(folder, "float32", "cpu", forward=forward) for forward in ("auto", "transformers"))
    assert ours.lean is not None
    assert theirs.lean is None
    expected = logits(theirs)
    tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
    assert (logits(ours) - expected).abs().max() <= tolerance
    kept = np.array([0, 7, 39])
    assert (logits(ours, kept) - expected[kept]).abs().max() <= tolerance


@pytest.mark.parametrize("folder", KNOWN, indirect=True)
def test_bfloat16_is_as_near_to_float32_as_the_modules_own_forward(folder):
    exact = logits(load_model(folder, "float32", "cpu", forward="transformers"))
    ours, theirs = (load_model(folder, "bfloat16", "cpu", forward=forward) for forward in ("auto", "transformers"))
    assert ours.lean is not None
    assert (logits(ours) - exact).norm() <= 1.2 * (logits(theirs) - exact).norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", ["llama, head tied", "qwen2", "gemma", "phi3"], indirect=True)
def test_weights_are_held_once_and_the_module_reads_them_too(folder, dtype):
    model, plain = load_model(folder, dtype, "cpu"), load_plain(folder, dtype)
    held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in model.module.parameters()}
    of_layers = [
        linear.weight
        for layer in model.lean._layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down, model.lean._head)
    ]
    assert all(weight.untyped_storage().data_ptr() in held for weight in of_layers)
    assert sum(held.values()) == sum(part.nbytes for part in plain.parameters())
    for (name, ours), (_, theirs) in zip(model.module.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert model.fingerprint() == load_model(folder, dtype, "cpu", forward="transformers").fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.model.layers[1].mlp, "act_fn", nn.GELU()),  # known, so it has to be followed
        lambda module: setattr(module.model.layers[1].self_attn, "scaling", 0.1),
    ],
)
def test_what_the_module_says_is_followed(tiny, monkeypatch, change):
    ours, theirs = (changed(tiny, monkeypatch, change, forward) for forward in ("auto", "transformers"))
    assert ours.lean is not None
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-3
    assert (logits(ours) - logits(load_model(tiny, "float32", "cpu"))).abs().max() > 1e-2


class Other(nn.Linear):
    """A linear module that does something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def other_linear(module):
    projection = module.model.layers[1].mlp.up_proj
    projection.__class__ = Other


def louder(module):
    module.model.layers[1].post_attention_layernorm.register_forward_hook(lambda _, args, out: out * 1.01)


@pytest.mark.parametrize(
    "change",
    [
        other_linear,
        louder,
        lambda module: setattr(module.model.layers[0], "extra", nn.Identity()),
        lambda module: module.model.rotary_emb.register_forward_hook(lambda _, args, out: out[::-1]),
    ],
)
def test_what_is_unknown_or_gives_other_logits_runs_as_it_is(tiny, monkeypatch, change):
    model = changed(tiny, monkeypatch, change, "auto")
    assert model.lean is None


def changed(folder, monkeypatch, change, forward):
    """Load a model that is changed between loading and the lean forward."""
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained

    def patched(*args, **options):
        module = load(*args, **options)
        change(module)
        return module

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", patched)
        return load_model(folder, "float32", "cpu", forward=forward)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_may_have_either_dimension_first(make_model, kind, tied):
    """With streams the output dimension is first, and some numbers of rows go to oneDNN."""
    folder = make_model(kind, tie_word_embeddings=tied)
    one, many = (load_model(folder, "float32", "cpu", streams=streams) for streams in (False, True))
    assert one.lean is not None
    assert many.lean is not None
    assert one.fingerprint() == many.fingerprint()
    for rows in (1, 3, 4, 64, 65):
        keys, values = torch.empty(2, one.memory.layers, one.memory.heads, rows, one.memory.dim)
        plan = Plan(rows, chunks=[Chunk.over(0, rows, keys, values)], writes=[Write(0, rows, keys, values)])
        tokens, positions = torch.arange(rows) * 3 + 1, torch.arange(rows)
        with torch.inference_mode():
            ours, theirs = (model.forward(tokens, positions, None, plan) for model in (one, many))
        assert (ours - theirs).abs().max() <= 1e-4 * max(1, float(theirs.abs().max()))


def test_a_wrong_lean_forward_is_not_used(tiny, monkeypatch):
    monkeypatch.setattr(lean.Norm, "__call__", lambda self, x: x * self.weight)
    assert load_model(tiny, "float32", "cpu").lean is None
    assert load_model(tiny, "bfloat16", "cpu").lean is None


def test_the_forward_is_chosen_by_the_url_and_told(tiny):
    def told(url):
        engine = open_engine(url)
        try:
            return engine.facts()["forward"]
        finally:
            asyncio.run(engine.close())

    assert told(f"local:{tiny}") == "lean"
    assert told(f"local:{tiny}?forward=transformers") == "transformers"
    with pytest.raises(UsageError, match="unknown forward 'fast'"):
        LocalEngine(tiny, forward="fast")
