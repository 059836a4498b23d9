"""A model with P streams (ParScale, arXiv:2505.10475) on the plan: streams are heads.

A token has one row in the plan and P vectors in the layers, one after another. Its queries, keys and values of all
streams are heads of that one row: nobody who packs, shares, copies, seals or evicts keys and values knows of streams.
Stream p's prefix of learned keys and values is what its heads read besides, in every row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from orchestra.errors import EngineError, UsageError
from orchestra.parscale.layout import is_parscale, read_config, read_streams, stream_count
from orchestra.parscale.streams import StreamSet
from orchestra.runtime.local.interface import mixing
from orchestra.runtime.local.segments import Memory
from orchestra.runtime.local.sources import Source

if TYPE_CHECKING:
    from orchestra.runtime.local.model import LoadedModel


def spread(
    streams: int, tokens: Tensor, positions: Tensor, keep: npt.NDArray[np.int64] | None
) -> tuple[Tensor, Tensor, npt.NDArray[np.int64] | None]:
    """A packed step's tokens, positions and wanted rows for layers that have so many vectors of each row."""
    if keep is not None:
        keep = (keep[:, None] * streams + np.arange(streams)).ravel()
    return tokens.repeat_interleave(streams), positions.repeat_interleave(streams), keep


def mixed(streams: StreamSet, hidden: Tensor) -> Tensor:
    """Hidden states `[..., rows * streams, hidden]` after the final norm, aggregated to `[..., rows, hidden]`."""
    apart = hidden.view(*hidden.shape[:-2], -1, streams.streams, hidden.shape[-1])
    return streams.aggregate(apart.movedim(-2, 0))


class Variants(NamedTuple):
    """A model with several numbers of streams.

    Attributes:
        models: by number of streams; 1 is the model under them. The weights are one, keys and values are their own.
        own: the number that is used where none is asked for.
    """

    models: dict[int, LoadedModel]
    own: int


def own_streams(place: Source) -> int:
    """How many streams a checkpoint has itself; 1 for a plain model."""
    values = read_config(place.model)
    return stream_count(values, place.model) if is_parscale(values) else 1


def variants(model: LoadedModel, place: Source, folders: Sequence[str] = ()) -> Variants:
    """A model with its own streams, and those of other checkpoints.

    Args:
        model: as loaded; nothing runs on it yet.
        place: where it is from.
        folders: of checkpoints whose streams were made for the same model.

    Raises:
        UsageError: there are none in a folder, they are for another model, two sets have as many streams, or the model
            cannot have streams.
    """
    own = own_streams(place)
    sources = [place.model] * (own > 1) + list(folders)
    return Variants(with_sets(model, [(source, read_streams(source)) for source in sources]), own)


def with_sets(model: LoadedModel, sets: Sequence[tuple[str, StreamSet]]) -> dict[int, LoadedModel]:
    """See `variants`; of each set it is said where it is from."""
    found = {1: model}
    origin: dict[int, str] = {}
    if sets:
        mixing(model.module)
    for where, streams in sets:
        count = streams.streams
        if count in origin:
            raise UsageError(f"{where} and {origin[count]} both have {count} streams; one set of a number can be used")
        try:
            found[count] = _variant(model, streams)
        except EngineError as error:
            raise UsageError(f"the streams of {where} cannot run on {model.source}: {error}") from error
        origin[count] = where
    return found


def fingerprint(models: Mapping[int, LoadedModel]) -> str:
    """`LoadedModel.fingerprint`, of a model with streams told from others by them, too."""
    whole = models[1].fingerprint()
    digest = hashlib.sha256(whole.encode())
    for _, model in sorted(models.items()):
        if (streams := model.streams) is not None:
            for part in (streams.keys, streams.values, *streams.inner, *streams.outer):
                digest.update(part.float().cpu().numpy().tobytes())
            digest.update(f"{streams.smoothing}".encode())
    return digest.hexdigest()[:16] if len(models) > 1 else whole


def _variant(model: LoadedModel, streams: StreamSet) -> LoadedModel:
    from orchestra.runtime.local.probe import probe_streams

    memory = model.memory
    count, prefix = streams.streams, streams.prefix
    width = model.module.get_output_embeddings().in_features
    wanted = {
        "prefix keys": (streams.keys, (memory.layers, count, memory.heads, prefix, memory.dim)),
        "prefix values": (streams.values, (memory.layers, count, memory.heads, prefix, memory.dim)),
        "first aggregation weight": (streams.inner[0], (width, width * count)),
        "second aggregation weight": (streams.outer[0], (count, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise EngineError(f"the {name} are {tuple(tensor.shape)}, for this model they are {shape}")
    streams = _moved(streams, memory.dtype, memory.device)
    keys, values = (x.flatten(1, 2).contiguous() for x in (streams.keys, streams.values))
    own = Memory(
        memory.layers,
        count * memory.heads,
        memory.dim,
        memory.dtype,
        memory.device,
        memory.windows,
        streams=count,
        prefix=(keys, values),
    )
    variant = replace(model, memory=own, streams=streams)
    probe_streams(variant)
    return variant


def _moved(streams: StreamSet, dtype: torch.dtype, device: torch.device) -> StreamSet:
    def move(x: Tensor) -> Tensor:
        return x.detach().to(device, dtype)

    inner, outer = ((move(weight), move(bias)) for weight, bias in (streams.inner, streams.outer))
    return replace(streams, keys=move(streams.keys), values=move(streams.values), inner=inner, outer=outer)
