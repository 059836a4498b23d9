"""How a model rotates is learned from the model, and moving a query along is exact."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import tiny_model

from orchestra.runtime.local.interface import ATTENTION
from orchestra.runtime.local.listen import listen
from orchestra.runtime.local.rotary import find_rotary

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e4,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
MODELS = [
    ("llama", {}, 8, False),
    ("llama", {"rope_parameters": YARN}, 8, False),
    ("llama", {"rope_parameters": LLAMA3}, 8, False),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, 8, False),
    ("qwen3", {}, 8, False),
    ("phi3", {"rope_parameters": PARTIAL}, 4, False),
    ("cohere", {}, 8, True),
    ("glm4", {}, 4, True),
]


def found(model, dtype=torch.float32):
    model = model.to(dtype)
    model.config._attn_implementation = ATTENTION
    return find_rotary(model, listen(model))


def rotated(model, x, positions):
    """Queries `[rows, heads, dim]` as transformers' own code rotates them."""
    code = sys.modules[type(model).__module__]
    cos, sin = model.model.rotary_emb(x, positions.unsqueeze(0))
    return code.apply_rotary_pos_emb(x.transpose(0, 1).unsqueeze(0), x.transpose(0, 1).unsqueeze(0), cos, sin)[0][
        0
    ].transpose(0, 1)


@pytest.mark.parametrize(("kind", "options", "width", "interleaved"), MODELS, ids=lambda value: str(value)[:30])
def test_a_turned_query_is_the_one_that_the_model_makes_further_on(kind, options, width, interleaved):
    model = tiny_model(kind, **options)
    rotary = found(model)
    assert {(layer.width, layer.interleaved) for layer in rotary.layers} == {(width, interleaved)}
    x = torch.randn(64, 4, 8, generator=torch.Generator().manual_seed(1))
    position = torch.arange(64) * 7
    delta = torch.arange(64) * 11 % 101 - 50
    position = position - delta.clamp(max=0)
    turned = rotary.turn(rotated(model, x, position), delta, 1)
    torch.testing.assert_close(turned, rotated(model, x, position + delta), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(turned, rotated(model, x, position), atol=0.1)


def test_attention_scaling_is_applied_once():
    model = tiny_model("llama", rope_parameters=YARN)
    assert model.model.rotary_emb.attention_scaling > 1.1
    x = torch.randn(5, 4, 8)
    turned = found(model).turn(x, torch.tensor([3, -2, 0, 100, 1000]), 0)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[2], x[2])


def test_each_kind_of_layer_has_its_own_frequencies():
    kinds = ["sliding_attention", "full_attention"]
    local, far = found(tiny_model("gemma3_text", sliding_window=16, layer_types=kinds)).layers
    assert float(local.frequencies[1]) == pytest.approx(1e4**-0.25)
    assert float(far.frequencies[1]) == pytest.approx(1e6**-0.25)


def test_layers_without_positions_turn_nothing():
    rotary = found(tiny_model("smollm3", no_rope_layers=[1, 0]))
    assert rotary.layers[0].width == 8
    assert rotary.layers[1] is None
    x = torch.randn(3, 4, 8)
    assert rotary.turn(x, torch.tensor([1, 2, 3]), 1) is x


@pytest.mark.parametrize("kind", ["llama", "glm4", "gemma3_text"])
def test_it_is_found_in_bfloat16(kind):
    expected = found(tiny_model(kind))
    rotary = found(tiny_model(kind), torch.bfloat16)
    assert [(a.width, a.interleaved) for a in rotary.layers] == [(a.width, a.interleaved) for a in expected.layers]
    assert rotary.turn(torch.randn(2, 4, 8).bfloat16(), torch.tensor([1, 2]), 0).dtype == torch.bfloat16


def test_a_model_that_does_more_than_rotate_is_not_followed():
    """Ministral 3 lengthens queries from some position on."""
    scaled = {**YARN, "llama_4_scaling_beta": 0.1}
    assert found(tiny_model("ministral3", sliding_window=None, rope_parameters=scaled)) is None
    even = {**YARN, "llama_4_scaling_beta": 0.0}
    assert found(tiny_model("ministral3", sliding_window=None, rope_parameters=even)) is not None
