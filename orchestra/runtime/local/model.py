"""Loading a Hugging Face causal model whose attention runs over our plan; refusing what the plan cannot do."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from orchestra.errors import EngineError, UsageError
from orchestra.parscale.layout import backbone_config, is_parscale, read_config
from orchestra.parscale.streams import StreamSet
from orchestra.runtime.attention.plan import Plan
from orchestra.runtime.local.adapters import merge_adapter
from orchestra.runtime.local.interface import ATTENTION, running
from orchestra.runtime.local.lean import Lean, lean_forward
from orchestra.runtime.local.listen import listen
from orchestra.runtime.local.probe import probe
from orchestra.runtime.local.refusal import refusal
from orchestra.runtime.local.rotary import Rotary, find_rotary
from orchestra.runtime.local.segments import Memory
from orchestra.runtime.local.sources import Source, load_tokenizer, local_folder, read
from orchestra.runtime.local.streams import mixed, own_streams, spread

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


FORWARDS = ("auto", "transformers")
"""Lean where that is known to give the same (see `lean`), or always the module's own: the oracle."""


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
        streams: what it is run with P streams by (`streams`); None for the model as it is.
    """

    module: Any
    tokenizer: Any
    source: str
    context: int
    eos: frozenset[int]
    memory: Memory
    rotary: Rotary | None = None
    lean: Lean | None = None
    streams: StreamSet | None = None

    def fingerprint(self) -> str:
        """Tells models apart, wherever they lie: a hash of every parameter's name, shape and some of its values."""
        digest = hashlib.sha256()
        for name, parameter in self.module.named_parameters():
            values = parameter.flatten()[:: max(1, parameter.numel() // 256)].float().cpu().numpy()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + values.tobytes())
        return digest.hexdigest()[:16]

    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the values of weights, by their names in the `state_dict`; nothing may run meanwhile.

        Raises:
            UsageError: one is missing, unknown or of another shape; nothing has changed then.
        """
        own = dict(self.module.named_parameters(remove_duplicate=False))
        given = {name: value for name, value in weights.items() if name in own}
        tied = {id(own[name]) for name in given}
        missing = sorted(name for name, parameter in own.items() if id(parameter) not in tied)
        unknown = sorted(weights.keys() - own.keys() - dict(self.module.named_buffers()).keys())
        shapes = [name for name, value in given.items() if value.shape != own[name].shape]
        for what, names in (("without", missing), ("which does not have", unknown), ("with another shape of", shapes)):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UsageError(f"these are not the weights of {self.source}: {what} {names[0]}{more}")
        for name, value in given.items():
            own[name].data.copy_(value)
        if self.lean is not None:  # it views the weights, but some of what it has is made from them
            self.lean = self.lean.anew(self.module)

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
        mix = None
        if self.streams is not None:
            tokens, positions, keep = spread(self.streams.streams, tokens, positions, keep)
            mix = partial(mixed, self.streams)
        if self.lean is not None:
            return self.lean(tokens, positions, keep, plan, mix)
        plan.layers_run = 0
        with running(plan, mix):
            logits: Tensor = self.module(
                input_ids=tokens.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                logits_to_keep=0 if keep is None else torch.from_numpy(keep).to(tokens.device),
            ).logits[0]
        if plan.layers_run != self.memory.layers:
            raise EngineError(f"attention ran in {plan.layers_run} of {self.memory.layers} layers")
        return logits


def load_model(
    source: str, dtype: str, device: str, adapter: str | None = None, forward: str = "auto", streams: bool = False
) -> LoadedModel:
    """Load a model and its tokenizer from a folder, or by id from the Hugging Face cache or hub.

    Args:
        source: folder or id of a model, or folder of a PEFT adapter, which names its model.
        dtype: one of `DTYPES`.
        device: a torch device.
        adapter: folder of a PEFT adapter to merge into the model.
        forward: see `FORWARDS`.
        streams: it will be run with streams (`streams.variants`); a model that has its own is in any case.

    Raises:
        UsageError: no such folder or model, unknown dtype or device, or an architecture that the plan cannot run.
        MissingExtraError: there is an adapter, and no peft.
    """
    if dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not available: {str(error).splitlines()[0]}") from error
    place = Source.of(source, adapter)
    config = _config(place)
    kind = f"{source} ({config.model_type})"
    if (reason := refusal(config)) is not None:
        raise UsageError(f"the in-process engine cannot run {kind}: it has {reason}")
    tokenizer = load_tokenizer(place, config)
    module = _load(place, dtype, ATTENTION, len(tokenizer), config).to(target)
    if not any("rotary" in name for name, _ in module.named_modules()):
        raise UsageError(f"the in-process engine cannot run {kind}: it has no rotary positions")
    try:
        heard = listen(module)
        _, _, heads, dim = heard.layers[0].key.shape
        memory = Memory(len(heard.layers), heads, dim, DTYPES[dtype], target)
        context = config.get_text_config().max_position_embeddings
        model = LoadedModel(module, tokenizer, source, context, _eos(module, tokenizer), memory)
        memory.windows = probe(model)
    except Exception as error:  # whatever goes wrong in a model's code: it cannot be run, and that is said now
        line = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"the in-process engine cannot run {kind}: {line[:300]}") from error
    model.rotary = find_rotary(module, heard)
    if forward == "auto":
        model.lean = lean_forward(model, heard, streams or own_streams(place) > 1)
    return model


def load_plain(source: str, dtype: str = "float32", attention: str = "", adapter: str | None = None) -> Any:
    """The same model with its own attention: the oracle of the parity law. With streams, it is the model class.

    `attention` is the name of an implementation; by default `sdpa`, but `eager` where scores are soft-capped, since
    transformers' `sdpa` leaves that out.
    """
    place = Source.of(source, adapter)
    config = _config(place)
    if own_streams(place) > 1 and not attention and place.adapter is None:
        from orchestra.parscale.model import ParScale

        return ParScale.from_pretrained(place.model, dtype=DTYPES[dtype]).eval().requires_grad_(False)
    if not attention:
        attention = "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else "sdpa"
    return _load(place, dtype, attention, 0 if place.adapter is None else len(load_tokenizer(place, config)), config)


def _config(place: Source) -> Any:
    """The configuration of a model; of one with streams, that of the model under them."""
    local = local_folder(place.model)
    if is_parscale(read_config(place.model)):
        return backbone_config(place.model)
    return read(lambda: transformers.AutoConfig.from_pretrained(place.model, local_files_only=local), place.model)


def _load(place: Source, dtype: str, attention: str, vocabulary: int, config: Any) -> Any:
    try:
        module = _pretrained(
            place.model,
            config=copy.deepcopy(config),  # from_pretrained writes the attention choice into what it is given
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            local_files_only=local_folder(place.model),
        )
    except UsageError as error:
        if isinstance(error.__cause__, KeyError) and attention in error.__cause__.args:
            why = "its code in transformers does not use the attention interface"
            raise UsageError(f"the in-process engine cannot run {place.model}: {why}") from error
        raise
    if place.adapter is not None:
        module = merge_adapter(module, place.adapter, vocabulary)
    return module.eval().requires_grad_(False)


def _pretrained(source: str, **options: Any) -> Any:
    """A causal model; of one with streams, that under them: their tensors are left out without a word."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    if not is_parscale(read_config(source)):
        return read(lambda: load(source, **options), source)
    module, told = read(lambda: load(source, output_loading_info=True, **options), source, warn=False)
    if missing := sorted(told["missing_keys"]):
        raise UsageError(f"{source} lacks the tensor {missing[0]} and {len(missing) - 1} more")
    return module


def _eos(module: Any, tokenizer: Any) -> frozenset[int]:
    """End-of-sequence ids of the generation configuration, else of the configuration, else of the tokenizer."""
    for holder in (getattr(module, "generation_config", None), module.config, tokenizer):
        found = getattr(holder, "eos_token_id", None)
        if found is not None:
            return frozenset(found if isinstance(found, list | tuple) else [found])
    return frozenset()
