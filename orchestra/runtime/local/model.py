"""Loading a Hugging Face causal model whose attention runs over our plan; refusing what the plan cannot do."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestra.errors import EngineError, UsageError
from orchestra.runtime.attention.plan import Chunk, Plan, Write
from orchestra.runtime.local.lean import Lean, lean_forward
from orchestra.runtime.local.rotary import Rotary, find_rotary
from orchestra.runtime.local.segments import Memory
from orchestra.runtime.local.sources import load_tokenizer, local_folder, read

ATTENTION = "orchestra_segments"
"""Name of our function in the transformers attention interface."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


FORWARDS = ("auto", "transformers")
"""Lean where that is known to give the same (see `lean`), or always the module's own: the oracle."""

# What an attention call may bring without changing its meaning here. Anything else that is set is refused by name.
_HARMLESS = frozenset({"position_ids", "use_cache", "is_causal", "output_attentions", "cache_position"})


def segment_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    orchestra_plan: Plan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function: shapes `[1, heads, rows, dim]` in, `[1, rows, heads, dim]` out."""
    if orchestra_plan is None:
        raise EngineError("this model was loaded for the in-process engine; its attention needs a plan")
    for name, given in options.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise UsageError(
                f"the in-process engine cannot run {type(module).__name__}: it needs {name!r} in attention"
            )
    if attention_mask is not None or dropout:
        raise UsageError(
            f"{type(module).__name__} brings {'dropout' if dropout else 'a mask'}; the plan handles neither"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: int = module.layer_idx
    query, key, value = (rows[0].transpose(0, 1) for rows in (query, key, value))
    out = orchestra_plan.run(layer, query, key, value, scale, window=sliding_window, softcap=softcap)
    return out.unsqueeze(0), None


@dataclass(slots=True, eq=False)
class LoadedModel:
    """A model with its tokenizer.

    Attributes:
        module: the causal model, in evaluation mode.
        tokenizer: its Hugging Face tokenizer.
        source: the folder or id it came from.
        context: most tokens along a path.
        eos: ids that end a sequence.
        memory: the shape of its keys and values.
        rotary: how it rotates queries and keys; None if not as `Rotary` can follow (then it cannot play Hogwild).
        lean: its forward in fewer calls; None to use the module's own.
    """

    module: Any
    tokenizer: Any
    source: str
    context: int
    eos: frozenset[int]
    memory: Memory
    rotary: Rotary | None = None
    lean: Lean | None = None

    def fingerprint(self) -> str:
        """Tells models apart, wherever they lie: a hash of every parameter's name, shape and some of its values."""
        digest = hashlib.sha256()
        for name, parameter in self.module.named_parameters():
            values = parameter.flatten()[:: max(1, parameter.numel() // 256)].float().cpu().numpy()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def forward(self, tokens: Tensor, positions: Tensor, keep: npt.NDArray[np.int64] | None, plan: Plan) -> Tensor:
        """One packed step.

        Args:
            tokens: ids, `[rows]`.
            positions: along each token's own path, `[rows]`.
            keep: the rows whose logits are wanted; None for all.
            plan: who reads what.

        Returns:
            Logits `[len(keep), vocabulary]`.
        """
        if self.lean is not None:
            return self.lean(tokens, positions, keep, plan)
        plan.layers_run = 0
        logits: Tensor = self.module(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=0 if keep is None else torch.from_numpy(keep).to(tokens.device),
            orchestra_plan=plan,
        ).logits[0]
        if plan.layers_run != self.memory.layers:
            raise EngineError(f"attention ran in {plan.layers_run} of {self.memory.layers} layers")
        return logits


def refusal(config: Any) -> str | None:
    """Why the plan cannot run a model of this configuration, or None."""

    def get(name: str) -> Any:
        return getattr(config, name, None)

    kind = get("model_type") or "unknown"
    layer_types = set(get("layer_types") or ())
    window = get("sliding_window")
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
    if get("attn_logit_softcapping"):
        return f"soft-capping of attention scores (attn_logit_softcapping = {config.attn_logit_softcapping})"
    if kind.startswith("gpt_oss"):
        return "attention sinks"
    if get("alibi") or kind in ("bloom", "mpt"):
        return "ALiBi positions"
    if linear := layer_types - {"full_attention", "sliding_attention", "chunked_attention"}:
        return f"layers of type {', '.join(sorted(linear))}"
    if "chunked_attention" in layer_types:
        return "chunked attention"
    windowed = "sliding_attention" in layer_types if layer_types else get("use_sliding_window") is not False
    if windowed and window and window < (get("max_position_embeddings") or window + 1):
        return f"a sliding window of {window} tokens (in effect below its context of {get('max_position_embeddings')})"
    if get("num_kv_shared_layers"):
        return "layers that share keys and values"
    if changing := rope_kinds & {"dynamic", "longrope"}:
        return f"rotary positions that change with the length ({', '.join(sorted(changing))})"
    if get("use_cache") is not None and get("position_embedding_type") not in (None, "rotary", "rope"):
        return f"{config.position_embedding_type} positions (rotary ones are needed)"
    return None


def load_model(source: str, dtype: str, device: str, forward: str = "auto") -> LoadedModel:
    """Load a model and its tokenizer from a folder, or by id from the Hugging Face cache or hub.

    Args:
        source: folder or id.
        dtype: one of `DTYPES`.
        device: a torch device.
        forward: see `FORWARDS`.

    Raises:
        UsageError: no such folder or model, unknown dtype or device, or an architecture that the plan cannot run.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    local = local_folder(source)
    config = read(lambda: transformers.AutoConfig.from_pretrained(source, local_files_only=local), source)
    if (reason := refusal(config)) is not None:
        raise UsageError(f"the in-process engine cannot run {source} ({config.model_type}): it has {reason}")
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, segment_attention)
    tokenizer = load_tokenizer(source)
    module = read(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            source,
            config=copy.deepcopy(config),  # from_pretrained writes the attention choice into what it is given
            dtype=DTYPES[dtype],
            attn_implementation=ATTENTION,
            local_files_only=local,
        ),
        source,
    )
    module = module.to(target).eval().requires_grad_(False)
    if not any("rotary" in name for name, _ in module.named_modules()):
        raise UsageError(f"the in-process engine cannot run {source} ({config.model_type}): it has no rotary positions")
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    memory = Memory(text.num_hidden_layers, heads, dim, DTYPES[dtype], target)
    model = LoadedModel(module, tokenizer, source, text.max_position_embeddings, _eos(module, tokenizer), memory)
    _probe(model)
    model.rotary = find_rotary(module, memory.layers)
    if forward == "auto":
        model.lean = lean_forward(model)
    return model


@torch.inference_mode()
def _probe(model: LoadedModel) -> None:
    """One forward of two tokens, so that what the plan cannot run is refused now and not in the middle of a run."""
    keys, values = (model.memory.allocate(model.memory.heads, 2) for _ in range(2))
    plan = Plan(2, chunks=[Chunk.over(0, 2, keys, values)], writes=[Write(0, 2, keys, values)])
    tokens = torch.zeros(2, dtype=torch.int64, device=model.memory.device)
    try:
        model.forward(tokens, torch.arange(2, device=model.memory.device), None, plan)
    except (EngineError, RuntimeError, TypeError, AttributeError) as error:
        line = " ".join(str(error).split())
        raise UsageError(f"the in-process engine cannot run {model.source}: {line[:300]}") from error
    finally:
        model.memory.free(keys, values)


def load_plain(source: str, dtype: str = "float32", attention: str = "sdpa") -> Any:
    """The same model with its own attention: the oracle of the parity law."""
    local = local_folder(source)
    module = read(
        lambda: transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=local
        ),
        source,
    )
    return module.eval().requires_grad_(False)


def _eos(module: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation configuration, else of the configuration, else of the tokenizer."""
    for holder in (getattr(module, "generation_config", None), module.config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()
