"""Refusing by name what the plan cannot run, from a model's configuration alone: before anything is loaded."""

from __future__ import annotations

from typing import Any


def refusal(config: Any) -> str | None:
    """Why the plan cannot run a model of this configuration, or None."""

    def get(name: str) -> Any:
        return getattr(config, name, None)

    kind = get("model_type") or "unknown"
    layer_types = set(get("layer_types") or ())
    rope = get("rope_parameters") or get("rope_scaling") or {}
    # Models with several layer types keep a set of rotary parameters for each.
    ropes = [rope, *(entry for entry in rope.values() if isinstance(entry, dict))] if isinstance(rope, dict) else []
    rope_kinds = {str(entry.get("rope_type") or entry.get("type") or "default") for entry in ropes}
    if get("is_encoder_decoder"):
        return "an encoder-decoder"
    if kind.startswith(("mamba", "rwkv", "falcon_mamba", "recurrent_gemma", "jamba")):
        return "recurrent (linear) layers"
    if get("kv_lora_rank"):
        return "multi-head latent attention (MLA)"
    if kind.startswith("gpt_oss"):
        return "attention sinks"
    if get("alibi") or kind in ("bloom", "mpt"):
        return "ALiBi positions"
    if linear := layer_types - {"full_attention", "sliding_attention", "chunked_attention"}:
        return f"layers of type {', '.join(sorted(linear))}"
    if "chunked_attention" in layer_types:
        return "chunked attention"
    if get("use_bidirectional_attention"):
        return "attention in both directions"
    if get("num_kv_shared_layers"):
        return "layers that share keys and values"
    if changing := rope_kinds & {"dynamic", "longrope"}:
        return f"rotary positions that change with the length ({', '.join(sorted(changing))})"
    if get("use_cache") is not None and get("position_embedding_type") not in (None, "rotary", "rope"):
        return f"{config.position_embedding_type} positions (rotary ones are needed)"
    return None
