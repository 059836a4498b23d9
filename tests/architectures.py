"""The architectures that the in-process engine is checked on: `name: (kind, configuration)` for `make_model`.

docs/engines.md lists them.
"""

from __future__ import annotations

from typing import Any

W = 6
"""Windows are shorter than the paths of the tests, so that they matter."""

KINDS = ["sliding_attention", "full_attention"]
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "rope_theta": 1e4,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, a key head for each head": ("llama", {"key_heads": 4}),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "llama, Llama 3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear scaling": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, windows": ("qwen3", {"use_sliding_window": True, "sliding_window": W, "max_window_layers": 1}),
    "mistral, one key head": ("mistral", {"key_heads": 1}),
    "mistral, window": ("mistral", {"sliding_window": W}),
    "ministral3": ("ministral3", {"sliding_window": None}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": W, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", {"sliding_window": W, "layer_types": KINDS, "query_pre_attn_scalar": 8}),
    "phi3": ("phi3", {}),
    "phi3, partial rotary, window": ("phi3", {"rope_parameters": PARTIAL, "sliding_window": W}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": W, "layer_types": KINDS}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": W, "layer_types": KINDS}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "stablelm": ("stablelm", {"rope_parameters": PARTIAL}),
    "afmoe": ("afmoe", {"sliding_window": W, "num_dense_layers": 1, **EXPERTS}),
    "arcee": ("arcee", {}),
    "ernie4_5": ("ernie4_5", {}),
    "exaone4": ("exaone4", {"sliding_window": W, "layer_types": KINDS}),
    "gpt_neox": ("gpt_neox", {"key_heads": 4, "rope_parameters": PARTIAL}),
    "helium": ("helium", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "ministral": ("ministral", {"sliding_window": W, "layer_types": KINDS}),
    "mixtral": ("mixtral", EXPERTS),
    "nanochat": ("nanochat", {}),
    "olmo": ("olmo", {}),
    "olmoe": ("olmoe", EXPERTS),
    "phi": ("phi", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "seed_oss": ("seed_oss", {}),
    "starcoder2": ("starcoder2", {"sliding_window": W}),
}
