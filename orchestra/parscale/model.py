"""ParScale as a model class of transformers: any standard causal model, unchanged, with P learned streams.

`generate`, `Trainer`, saving and loading are those of the backbone's class, from which a class is made
(`Qwen2ForCausalLM` becomes `Qwen2ParScaleForCausalLM`). A hook before the decoder repeats its input P times, streams
outer (row p * batch + b); `attention.py` shows each stream its prefix; a hook after the final norm mixes the streams,
so that the head and the loss see one. With P = 1 all of that rests, and the model is the plain one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from orchestra.errors import UsageError
from orchestra.parscale import attention
from orchestra.parscale.initial import fresh_streams
from orchestra.parscale.layout import backbone_config, published_config, read_config, read_streams, stream_count
from orchestra.parscale.streams import StreamSet, aggregate
from orchestra.runtime.local.sources import local_folder, read

_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds")


class ParScale(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped to mypy
    """A causal model with P streams. `ParScale.from_pretrained` and `ParScale.recycle` make one."""

    _keys_to_ignore_on_load_unexpected = (r"\.prefix_[kv]$", r"\.aggregate_layer\.")  # `set_streams` puts them in

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(config, *arguments, **options)
        self._prepare()

    def _prepare(self) -> None:
        self._plain_attention = self.config._attn_implementation
        self.config.parscale_n = 1
        self.model.register_forward_pre_hook(_spread, with_kwargs=True)
        self.model.register_forward_hook(_gather, with_kwargs=True)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Any:
        """Load a checkpoint in the published layout; no code of its own is run.

        Args:
            source: folder, which never asks the network, or Hugging Face id such as `ParScale/ParScale-1.8B-P8`.
            **options: of transformers' `from_pretrained` (`dtype`, `device_map`).

        Raises:
            UsageError: it is no such checkpoint, or incomplete.
        """
        config = backbone_config(source)
        if cls is ParScale:
            kind = _class_of(_causal(config, source))
            return kind.from_pretrained(source, **options)
        options |= {"local_files_only": local_folder(str(source)), "output_loading_info": True}
        model, told = read(lambda: super(ParScale, cls).from_pretrained(source, config=config, **options), str(source))
        if missing := sorted(told["missing_keys"]):
            raise UsageError(
                f"{source} lacks the tensor {missing[0]}" + f" and {len(missing) - 1} more" * (len(missing) > 1)
            )
        model.load_streams(source)
        return model

    @staticmethod
    def recycle(
        backbone: Any,
        streams: int,
        *,
        prefix_tokens: int = 48,
        smoothing: float = 0.1,
        seed: int = 0,
        key_std: float | None = None,
    ) -> Any:
        """Put fresh streams on a trained model; see `fresh_streams` for what they start from.

        Args:
            backbone: a causal model of transformers, which becomes the result itself (no weight is copied), or the
                folder or Hugging Face id of one.
            streams: how many; 1 gives the plain model in the published layout.
            prefix_tokens: length of the learned prefixes.
            smoothing: part of the streams' weight that is shared out evenly.
            seed: of the fresh parameters.
            key_std: see `fresh_streams`.

        Raises:
            UsageError: the backbone is of a kind that cannot have streams.
        """
        if isinstance(backbone, str | Path):
            place, local = str(backbone), local_folder(str(backbone))
            backbone = read(
                lambda: transformers.AutoModelForCausalLM.from_pretrained(place, local_files_only=local), place
            )
        if isinstance(backbone, ParScale):
            raise UsageError("this model has streams already; use set_streams or load_streams")
        _check(backbone)
        backbone.__class__ = _class_of(type(backbone))  # type: ignore[arg-type]  # mypy doubts that types are hashable
        backbone._prepare()
        if streams != 1:
            backbone.set_streams(fresh_streams(backbone, streams, prefix_tokens, smoothing, seed, key_std))
        return backbone

    @property
    def streams(self) -> StreamSet | None:
        """A copy of the streams' parameters, or None of the plain model."""
        if self.config.parscale_n == 1:
            return None
        layers = [layer.self_attn for layer in self.model.layers]
        return StreamSet(
            keys=torch.stack([layer.prefix_k.detach().to(layers[0].prefix_k.device) for layer in layers]),
            values=torch.stack([layer.prefix_v.detach().to(layers[0].prefix_v.device) for layer in layers]),
            inner=_linear(self.model.aggregate_layer[0], copy=True),
            outer=_linear(self.model.aggregate_layer[2], copy=True),
            smoothing=self.config.parscale_attn_smooth,
        )

    def set_streams(self, streams: StreamSet | None) -> None:
        """Put this set on the backbone, in place of the one that it has; None leaves the plain model.

        Raises:
            UsageError: it belongs to a backbone of another shape.
        """
        _check(self)
        if streams is not None:
            self._check_fit(streams)
        layers: list[Any] = [layer.self_attn for layer in self.model.layers]
        if self.config.parscale_n > 1:
            for layer in layers:
                del layer.prefix_k, layer.prefix_v
            del self.model.aggregate_layer
        self.config.parscale_n = 1
        self.set_attn_implementation(self._plain_attention)
        if streams is None:
            return
        weight = self.get_input_embeddings().weight
        for layer, keys, values in zip(layers, streams.keys, streams.values, strict=True):
            place = next(layer.parameters())
            layer.prefix_k = nn.Parameter(keys.to(place, copy=True))
            layer.prefix_v = nn.Parameter(values.to(place, copy=True))
        inner, outer = _layer(streams.inner, weight), _layer(streams.outer, weight)
        self.model.aggregate_layer = nn.Sequential(inner, nn.SiLU(), outer)
        self.config.parscale_n = streams.streams
        self.config.parscale_n_tokens = streams.prefix
        self.config.parscale_attn_smooth = streams.smoothing
        self.set_attn_implementation(attention.NAME)

    def load_streams(self, source: str | Path) -> None:
        """Put the streams of a checkpoint on this backbone, whose own weights stay ("dynamic P").

        Args:
            source: folder or Hugging Face id; a checkpoint with P = 1 leaves the plain model.

        Raises:
            UsageError: it is no ParScale checkpoint, incomplete, or of a backbone of another shape.
        """
        count = stream_count(read_config(source), source)
        self.set_streams(None if count == 1 else read_streams(source))

    def stream_parameters(self) -> Iterator[nn.Parameter]:
        """The prefixes and the aggregation network."""
        for name, parameter in self.named_parameters():
            if ".prefix_" in name or ".aggregate_layer." in name:
                yield parameter

    def freeze_backbone(self) -> None:
        """Leave only the streams' parameters to be trained."""
        self.requires_grad_(False)
        for parameter in self.stream_parameters():
            parameter.requires_grad_(True)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the published layout; the options are those of transformers' `save_pretrained`."""
        super().save_pretrained(folder, **options)
        path = Path(folder) / "config.json"
        if options.get("is_main_process", True):
            config = published_config(json.loads(path.read_text(encoding="utf-8")), type(self).__name__)
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _reorder_cache(self, cache: Any, beams: Tensor) -> Any:
        # `generate` counts rows without streams: each of the P blocks of the cache is permuted alike.
        blocks = torch.arange(self.config.parscale_n, device=beams.device)[:, None] * len(beams)
        cache.reorder_cache((blocks + beams).flatten())
        return cache

    def _check_fit(self, streams: StreamSet) -> None:
        plain = self.config.get_text_config()
        heads = getattr(plain, "num_key_value_heads", None) or plain.num_attention_heads
        dim = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
        wanted = [plain.num_hidden_layers, heads, dim, plain.hidden_size]
        layers, _, of, _, wide = streams.keys.shape
        have = [layers, of, wide, streams.outer[0].shape[1]]
        if have != wanted:
            raise UsageError(f"these streams have layers, key heads, head size, hidden size {have}; the model {wanted}")


@cache
def _class_of(backbone: Any) -> Any:
    return type(backbone.__name__.replace("For", "ParScaleFor", 1), (ParScale, backbone), {})


def _causal(config: Any, source: str | Path) -> Any:
    try:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise UsageError(f"the backbone of {source} ({config.model_type}) is no causal language model") from None


def _check(model: Any) -> None:
    """Raises `UsageError` where the prefix would not be seen, or at the wrong place."""
    config = model.config.get_text_config()
    layers = getattr(getattr(model, "model", None), "layers", ())
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        raise UsageError(f"a {config.model_type} model cannot have streams: it has no model.layers[i].self_attn")
    if not model._supports_sdpa or not model._supports_attention_backend:
        raise UsageError(f"a {config.model_type} model cannot have streams: its attention cannot be replaced")
    if getattr(config, "attn_logit_softcapping", None):
        raise UsageError(f"a {config.model_type} model cannot have streams: its attention scores are capped")


def _layer(values: tuple[Tensor, Tensor], like: Tensor) -> nn.Linear:
    outputs, inputs = values[0].shape
    layer = nn.Linear(inputs, outputs, device="meta", dtype=like.dtype).to_empty(device=like.device)
    layer.load_state_dict(dict(zip(("weight", "bias"), values, strict=True)))
    return layer


def _linear(layer: nn.Linear, copy: bool = False) -> tuple[Tensor, Tensor]:
    return (layer.weight.detach().clone(), layer.bias.detach().clone()) if copy else (layer.weight, layer.bias)


def _spread(
    decoder: Any, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]] | None:
    """Before the decoder: one row for each stream and sequence, and positions that padding does not move."""
    streams = decoder.config.parscale_n
    if streams == 1:
        return None
    options |= dict(zip(_ARGUMENTS, arguments, strict=False))
    tokens = options["inputs_embeds"] if options.get("input_ids") is None else options["input_ids"]
    seen = options.get("attention_mask")
    if options.get("position_ids") is None and isinstance(seen, Tensor) and seen.ndim == 2:
        options["position_ids"] = (seen.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    for name in ("input_ids", "inputs_embeds", "position_ids", "attention_mask"):
        if isinstance(options.get(name), Tensor):
            options[name] = _repeat(options[name], streams)
    if isinstance(seen, dict):  # one for each kind of layer, as `generate` prepares them for static caches
        options["attention_mask"] = {kind: _repeat(one, streams) for kind, one in seen.items()}
    return (), options


def _repeat(rows: Tensor, streams: int) -> Tensor:
    return rows.repeat(streams, *[1] * (rows.ndim - 1))


def _gather(decoder: Any, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> Any:
    """After the final norm: the streams' weighted sum in place of the streams."""
    config = decoder.config
    if config.parscale_n == 1:
        return None
    inner, _, outer = decoder.aggregate_layer
    hidden = output[0].unflatten(0, (config.parscale_n, -1))
    mixed = aggregate(hidden, _linear(inner), _linear(outer), config.parscale_attn_smooth)
    if isinstance(output, tuple):
        return (mixed, *output[1:])
    output["last_hidden_state"] = mixed
    return output
