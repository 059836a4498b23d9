"""From a URL to an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from orchestra.errors import UsageError, one_of
from orchestra.runtime.engine import Engine

ENGINES: dict[str, str] = {
    "demo": "the embedded model, in process: no download, no GPU; it speaks Countdown and little else",
    "local:PATH_OR_ID?dtype=bfloat16&device=cuda": "in-process PyTorch on a Hugging Face causal model",
    "sglang://HOST:PORT": "a running SGLang server (not in this version)",
    "sglang:PATH_OR_ID?tp=2": "starts and owns an SGLang server (not in this version)",
    "openai://HOST:PORT/v1?model=NAME": "any OpenAI-compatible server (not in this version)",
    "replay:FILE.jsonl?rate=50": "recorded samples on a simulated clock, so many tokens a second",
}

_LATER = ("sglang", "openai", "openais")
_EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "embedded"
_EMBEDDED_HINT = "the embedded model speaks Countdown ('numbers: 3 7 8 12 target: 55') and little else"


def open_engine(url: str) -> Engine:
    """The engine that a URL names, not yet opened.

    Raises:
        UsageError: no such engine, or a parameter that it does not have.
        MissingExtraError: its packages are not installed.
    """
    scheme, _, rest = url.partition(":")
    target, _, query = rest.partition("?")
    if url.startswith("demo?"):
        scheme, _, query = url.partition("?")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if scheme in _LATER:
        raise UsageError(f"engine {url!r}: {scheme} engines are not in this version; use demo or local:PATH")
    if scheme == "demo":
        return _local("demo", str(_EMBEDDED), parameters, hint=_EMBEDDED_HINT)
    if scheme == "local":
        if not target:
            raise UsageError("a local engine needs a model: local:PATH_OR_ID, such as local:./my-model?dtype=bfloat16")
        return _local(f"local:{target}", target, parameters)
    if scheme == "replay":
        return _replay(target, parameters)
    raise UsageError(one_of("engine", scheme, ("demo", "local", "replay", *_LATER)) + f", from {url!r}")


_LOCAL: Mapping[str, Callable[[str], Any]] = {
    "dtype": str,
    "device": str,
    "kernel": str,
    "max_batch": int,
    "prefill": int,
    "memory": int,
}


def _local(name: str, model: str, parameters: Mapping[str, str], **fixed: Any) -> Engine:
    values: dict[str, Any] = {}
    for key, text in parameters.items():
        if key not in _LOCAL:
            raise UsageError(one_of("engine parameter", key, _LOCAL))
        try:
            values[key] = _LOCAL[key](text)
        except ValueError:
            raise UsageError(f"engine parameter {key} = {text!r} is not a number") from None
    from orchestra.extras import require

    require("torch", "transformers", what="an in-process engine", extra="local")
    from orchestra.runtime.local.engine import LocalEngine

    engine = LocalEngine(model, **values, **fixed)
    engine.name = name
    return engine


def _replay(file: str, parameters: Mapping[str, str]) -> Engine:
    from orchestra.runtime.replay import RATE, ReplayEngine

    if not file:
        raise UsageError(
            "a replay engine needs recorded samples: replay:FILE.jsonl, such as replay:runs/A/samples.jsonl"
        )
    for key in parameters:
        if key != "rate":
            raise UsageError(one_of("engine parameter", key, ("rate",)))
    try:
        rate = float(parameters.get("rate", RATE))
    except ValueError:
        raise UsageError(f"engine parameter rate = {parameters['rate']!r} is not a number") from None
    return ReplayEngine(file, rate=rate)
