"""The published layout of ParScale checkpoints, read and written without remote code.

A folder holds an ordinary causal model under its usual tensor names, and beside them

- `model.layers.{i}.self_attn.prefix_k`, `prefix_v`: `[streams, key heads, prefix tokens, dim]`,
- `model.aggregate_layer.0`, `.2`, weight and bias: `[hidden, hidden * streams]` and `[streams, hidden]`,

and in `config.json` a model type such as `qwen2_parscale` with `parscale_n`, `parscale_n_tokens` and
`parscale_attn_smooth`. A model with `parscale_n` 1 is the plain model and has none of the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor

from orchestra.errors import UsageError
from orchestra.parscale.streams import StreamSet
from orchestra.runtime.local.sources import local_folder, read

SUFFIX = "_parscale"
"""What the model type of a backbone is followed by."""
SMOOTHING = 0.01
"""What the authors' code takes where the configuration is silent. The released ones say 0.1."""
PREFIX_TOKENS = 48

_CONFIG = "config.json"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_INNER, _OUTER = "model.aggregate_layer.0", "model.aggregate_layer.2"


def is_parscale(config: Mapping[str, Any]) -> bool:
    """Whether this is the content of the `config.json` of a ParScale model, P = 1 included."""
    return "parscale_n" in config or str(config.get("model_type", "")).endswith(SUFFIX)


def read_config(source: str | Path) -> dict[str, Any]:
    """The content of `config.json`.

    Args:
        source: model folder, which never asks the network, or Hugging Face id.

    Raises:
        UsageError: there is none, or it is not JSON.
    """
    path = _file(str(source), _CONFIG)
    if path is None:
        raise UsageError(f"{source} has no {_CONFIG}, or it cannot be fetched")
    return _json(path)


def stream_count(config: Mapping[str, Any], source: str | Path = "the configuration") -> int:
    """`parscale_n` of the content of a `config.json`.

    Raises:
        UsageError: it is missing, or no count; `source` is what to call the checkpoint.
    """
    if "parscale_n" not in config:
        raise UsageError(f"{source} is not a ParScale checkpoint: its {_CONFIG} has no parscale_n")
    count = config["parscale_n"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UsageError(f"parscale_n of {source} must be a positive number of streams, not {count!r}")
    return count


def backbone_config(source: str | Path) -> Any:
    """The transformers configuration of the plain model under the streams; `auto_map` is ignored.

    Args:
        source: folder or Hugging Face id of a ParScale checkpoint.

    Raises:
        UsageError: it is none, or transformers does not know its backbone.
    """
    values = read_config(source)
    if not is_parscale(values):
        raise UsageError(f"{source} is not a ParScale checkpoint: its {_CONFIG} has no parscale_n")
    kind = str(values.get("model_type", "")).removesuffix(SUFFIX)
    if kind not in transformers.CONFIG_MAPPING:
        raise UsageError(f"the backbone of {source} is of type {kind!r}, which transformers does not know")
    dropped = {"model_type", "auto_map", "architectures", "transformers_version"}
    kept = {key: value for key, value in values.items() if key not in dropped and not key.startswith("parscale_")}
    return read(lambda: transformers.CONFIG_MAPPING[kind].from_dict(kept), str(source))


def read_streams(source: str | Path) -> StreamSet:
    """The parameters of a checkpoint's streams, on the CPU in the type that they are stored in.

    Only their tensors are read, from a single file or from the shards that hold them.

    Args:
        source: folder or Hugging Face id.

    Raises:
        UsageError: it is no ParScale checkpoint, has one stream (and so nothing to read), or a tensor is missing or
            has another shape than the configuration says.
    """
    values = read_config(source)
    streams = stream_count(values, source)
    if streams == 1:
        raise UsageError(f"parscale_n of {source} is 1: it is the plain model and has no streams to read")
    plain = backbone_config(source).get_text_config()
    heads = getattr(plain, "num_key_value_heads", None) or plain.num_attention_heads
    dim = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    prefix = (streams, heads, int(values.get("parscale_n_tokens", PREFIX_TOKENS)), dim)
    layers, hidden = range(plain.num_hidden_layers), plain.hidden_size
    wanted: dict[str, tuple[int, ...]] = {name: prefix for part in "kv" for name in prefix_names(layers, part)}
    wanted |= {f"{_INNER}.weight": (hidden, hidden * streams), f"{_INNER}.bias": (hidden,)}
    wanted |= {f"{_OUTER}.weight": (streams, hidden), f"{_OUTER}.bias": (streams,)}
    found = dict(_tensors(str(source), wanted))
    for name, shape in wanted.items():
        if name not in found:
            raise UsageError(f"{source} lacks the tensor {name}")
        if tuple(found[name].shape) != shape:
            have = list(found[name].shape)
            raise UsageError(f"{name} of {source} has the shape {have}; its {_CONFIG} asks for {list(shape)}")
    return StreamSet(
        keys=torch.stack([found[name] for name in prefix_names(layers, "k")]),
        values=torch.stack([found[name] for name in prefix_names(layers, "v")]),
        inner=(found[f"{_INNER}.weight"], found[f"{_INNER}.bias"]),
        outer=(found[f"{_OUTER}.weight"], found[f"{_OUTER}.bias"]),
        smoothing=float(values.get("parscale_attn_smooth", SMOOTHING)),
    )


def prefix_names(layers: Iterable[int], part: str) -> list[str]:
    """Names of the prefixes' keys (`part` "k") or values ("v")."""
    return [f"model.layers.{layer}.self_attn.prefix_{part}" for layer in layers]


def published_config(config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """What `config.json` says in the published layout.

    Rotary settings and the type are also told where code of the time of the publication looks for them.

    Args:
        config: the backbone's, as transformers writes it, with the `parscale_` fields.
        architecture: name of the model class.
    """
    values = {key: value for key, value in config.items() if key != "auto_map"}
    values["model_type"] = str(values["model_type"]).removesuffix(SUFFIX) + SUFFIX
    values["architectures"] = [architecture]
    rotary = values.get("rope_parameters")
    if rotary and "rope_theta" in rotary:
        scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
        values["rope_theta"] = rotary["rope_theta"]
        values["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if "dtype" in values:
        values["torch_dtype"] = values["dtype"]
    return values


def _file(source: str, name: str) -> Path | None:
    """A file of a folder, or of the Hugging Face cache or hub; None where there is none."""
    if local_folder(source):
        path = Path(source).expanduser() / name
        return path if path.is_file() else None
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = read(lambda: transformers.utils.cached_file(source, name, **quiet), source)
    return None if found is None else Path(found)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"cannot read {path}: it is not an object")
    return values


def _tensors(source: str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of the tensors that there are, each shard opened once."""
    index = _file(source, _INDEX)
    if index is None:
        place: dict[str, str] = dict.fromkeys(names, _SINGLE)
    else:
        shards = _json(index).get("weight_map", {})
        place = {name: shards[name] for name in names if name in shards}
    for shard in sorted(set(place.values())):
        path = _file(source, shard)
        if path is None:
            raise UsageError(f"{source} has no {shard}, or it cannot be fetched")
        try:
            with safe_open(path, framework="pt") as file:
                held = set(file.keys())
                for name in place:
                    if place[name] == shard and name in held:
                        yield name, file.get_tensor(name)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error}") from error
        except Exception as error:
            raise UsageError(f"cannot read {path}: it is not a safetensors file ({error})") from error
