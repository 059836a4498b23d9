"""What an SGLang server, or the router in front of several, says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestra.errors import EngineError, UsageError
from orchestra.runtime.ends import ends_in
from orchestra.runtime.http import Fault, Refused, Server
from orchestra.runtime.openings import openings_in


@dataclass(frozen=True, slots=True)
class About:
    """What an engine must know of a server.

    Attributes:
        model: the name under which it serves its model.
        context: most tokens along a path, if it says.
        longest: most tokens of an input, if it says; a few less.
        incremental: whether its streams hold what is new, or all so far.
        workers: URLs of the servers behind it, if it is a router.
        openings: see `Engine.openings`; if its model is a folder that is here too.
        ends: its model's end-of-sequence ids, if its model is a folder that is here too.
        facts: for the manifest.
    """

    model: str
    context: int | None = None
    longest: int | None = None
    incremental: bool = False
    workers: tuple[str, ...] = ()
    ends: frozenset[int] = frozenset()
    facts: dict[str, Any] = field(default_factory=dict)
    openings: Mapping[str, str] = field(default_factory=dict)


async def about(server: Server, name: str, wanted: str = "") -> About:
    """Ask a server what it is.

    Args:
        server: the way to it.
        name: what errors call it.
        wanted: the model that it must serve; empty for any.

    Raises:
        UsageError: it is no SGLang server, or serves other models.
        Fault, Refused: it does not answer.
    """
    models = await server.ask("GET", "/v1/models")
    try:
        served = {str(model["id"]): model for model in models["data"]}
        chosen = served[wanted] if wanted in served else next(iter(served.values()))
    except (KeyError, TypeError, StopIteration) as error:
        raise EngineError(f"{name} does not answer like an SGLang server") from error
    if wanted and wanted not in served:
        raise UsageError(f"{name} serves {', '.join(served)}, not {wanted!r}")
    info = await _first(server, "/model_info", "/get_model_info")
    state = await _first(server, "/server_info", "/get_server_info")
    if not info and not state:
        raise UsageError(f"{name} is no SGLang server; an OpenAI-compatible one is openai://{server.where}/v1")
    model = str(chosen["id"])
    path = folder if isinstance(folder := info.get("model_path"), str) and folder.startswith("/") else ""
    limits = [chosen.get("max_model_len"), state.get("max_total_num_tokens")]
    longest = state.get("max_req_input_len")
    context = min((int(limit) for limit in limits if limit), default=None)
    facts = {
        "engine": "sglang",
        "model": model.rstrip("/").rsplit("/", 1)[-1] if model.startswith("/") else model,
        "architecture": info.get("model_type"),
        "weight_version": info.get("weight_version"),
        "context_length": context,
        "dtype": state.get("dtype"),
        "sglang": state.get("version"),
        "attention": state.get("attention_backend"),
        "tensor_parallel": state.get("tp_size"),
        "data_parallel": state.get("dp_size"),
    }
    return About(
        model,
        context,
        longest - 1 if isinstance(longest, int) else None,
        bool(state.get("incremental_streaming_output")),
        await _workers(server) if state.get("router_manager") else (),
        ends_in(path) if path else frozenset(),
        {key: value for key, value in facts.items() if value is not None},
        openings_in(path) if path else {},
    )


async def _first(server: Server, *paths: str) -> dict[str, Any]:
    """What the first of these paths that exists says; older servers and the router lack some."""
    for path in paths:
        try:
            found = await server.ask("GET", path)
        except Refused as refusal:
            if refusal.status in (401, 403):
                raise
            continue
        return found if isinstance(found, dict) else {}
    return {}


async def _workers(server: Server) -> tuple[str, ...]:
    found = await server.ask("GET", "/workers")
    try:
        return tuple(str(worker["url"]) for worker in found["workers"] if worker.get("is_healthy", True))
    except (KeyError, TypeError) as error:
        raise Fault("its list of workers has another shape") from error
