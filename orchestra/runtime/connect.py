"""From a URL to an engine."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from orchestra.errors import UsageError, one_of
from orchestra.runtime.engine import Engine
from orchestra.runtime.limits import Limits

EMBEDDED = Path(__file__).resolve().parent.parent / "assets" / "embedded"
_EMBEDDED_HINT = "the embedded model speaks Countdown ('numbers: 3 7 8 12 target: 55') and little else"
_LIMITS = tuple(Limits.__dataclass_fields__)


def open_engine(url: str) -> Engine:
    """The engine that a URL names, not yet opened.

    Raises:
        UsageError: no such engine, or a parameter that it does not have.
        MissingExtraError: its packages are not installed.
    """
    address, _, query = url.partition("?")
    scheme, _, target = address.partition(":")
    parameters = dict(parse_qsl(query, keep_blank_values=True))
    if scheme not in _OPENERS:
        raise UsageError(one_of("engine", scheme, _OPENERS) + f", from {_shown(url)!r}; see `orchestra engines`")
    return _OPENERS[scheme](url, target, parameters)


def _take(
    parameters: dict[str, str], known: Mapping[str, Callable[[str], Any]], also: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Values of the known parameters; the others are refused (`also`: further names to list)."""
    values: dict[str, Any] = {}
    for key, text in parameters.items():
        if key not in known:
            raise UsageError(one_of("engine parameter", key, (*known, *also)))
        try:
            values[key] = known[key](text)
        except UsageError:  # is a ValueError, and says more
            raise
        except ValueError:
            raise UsageError(f"engine parameter {key} = {text!r} is not a number") from None
    return values


# -- in process --------------------------------------------------------------------------------------------------------

_LOCAL: Mapping[str, Callable[[str], Any]] = {
    "dtype": str,
    "device": str,
    "kernel": str,
    "forward": str,
    "max_batch": int,
    "prefill": int,
    "memory": int,
    "prefix_cache": int,
}


def _demo(url: str, target: str, parameters: dict[str, str]) -> Engine:
    if target:
        raise UsageError(f"the demo engine has one model: demo, not {_shown(url)!r}; local:PATH_OR_ID takes another")
    return _in_process("demo", str(EMBEDDED), _take(parameters, _LOCAL), hint=_EMBEDDED_HINT)


def _local(url: str, target: str, parameters: dict[str, str]) -> Engine:
    if not target:
        raise UsageError("a local engine needs a model: local:PATH_OR_ID, such as local:./my-model?dtype=bfloat16")
    values = _take(parameters, {**_LOCAL, "adapter": str, "streams": _folders})
    adapter = f"?adapter={values['adapter']}" if "adapter" in values else ""
    return _in_process(f"local:{target}{adapter}", target, values)


def _folders(text: str) -> tuple[str, ...]:
    return tuple(folder for folder in text.split(",") if folder)


def _in_process(name: str, model: str, values: dict[str, Any], **fixed: Any) -> Engine:
    from orchestra.extras import require

    require("torch", "transformers", what="an in-process engine", extra="local")
    from orchestra.runtime.local.engine import LocalEngine

    engine = LocalEngine(model, **values, **fixed)
    engine.name = name
    return engine


# -- servers -----------------------------------------------------------------------------------------------------------


def _sglang(url: str, target: str, parameters: dict[str, str]) -> Engine:
    if not target:
        raise UsageError("an SGLang engine needs a server, sglang://HOST:PORT, or a model to serve, sglang:PATH_OR_ID")
    limits = Limits.take(parameters)
    from orchestra.runtime.http import Server
    from orchestra.runtime.sglang import SGLangEngine
    from orchestra.runtime.sglang_owned import OwnedSGLangEngine
    from orchestra.runtime.sglang_server import FLAGS, SGLangServer

    if target.startswith("//"):
        where, headers = _address(url, target), _key(parameters, "SGLANG_API_KEY")
        if urlsplit(target).path.strip("/"):
            raise UsageError(f"an SGLang engine is sglang://{where}, without a path; openai://{where}/v1 has one")
        options = _sglang_options(parameters, ("model", *_LIMITS, "key_file"))
        return SGLangEngine(f"sglang://{where}", Server(f"http://{where}", limits, headers), **options)
    flags = {name: parameters.pop(name) for name in list(parameters) if name in FLAGS}
    options = _sglang_options(parameters, (*FLAGS, *_LIMITS))
    process = SGLangServer(str(EMBEDDED) if target == "demo" else target, flags=flags)
    return OwnedSGLangEngine(f"sglang:{target}", process, Server(f"http://127.0.0.1:{process.port}", limits), **options)


def _sglang_options(parameters: dict[str, str], also: tuple[str, ...]) -> dict[str, Any]:
    model = {"model": parameters.pop("model")} if "model" in parameters and "model" in also else {}
    values = _take(parameters, {"n": _group, "interval": _positive, "tokenizer": str}, also)
    if "n" in values:
        values["group"] = values.pop("n")
    return values | model


def _openai(url: str, target: str, parameters: dict[str, str]) -> Engine:
    where = _address(url, target)
    path = urlsplit(target).path.rstrip("/") or "/v1"
    limits, headers = Limits.take(parameters), _key(parameters, "OPENAI_API_KEY")
    known: dict[str, Callable[[str], Any]] = {"model": str, "n": _group}
    known |= {"api": _one_of("auto", "chat", "completions"), "continue": _one_of("on", "off")}
    values = _take(parameters, known, (*_LIMITS, "key_file"))
    from orchestra.runtime.http import Server
    from orchestra.runtime.openai import OpenAIEngine

    scheme = url.partition(":")[0]
    return OpenAIEngine(
        f"{scheme}://{where}{path}",
        Server(f"{'https' if scheme == 'openais' else 'http'}://{where}", limits, headers),
        prefix=path,
        model=values.get("model", ""),
        api=values.get("api", "auto"),
        group=values.get("n", 256),
        continues=values.get("continue") == "on",
    )


def _one_of(*choices: str) -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text not in choices:
            raise UsageError(f"an engine parameter is one of {', '.join(choices)}, not {text!r}")
        return text

    return chosen


def _address(url: str, target: str) -> str:
    """HOST:PORT of a server's URL.

    Raises:
        UsageError: there is none, or it holds a key.
    """
    if "@" in target.removeprefix("//").partition("/")[0]:
        raise UsageError("an engine URL holds no key: put it into the environment, or into a file (key_file=PATH)")
    try:
        parts = urlsplit(target)
        good = bool(parts.hostname) and (parts.port is not None or ":" not in parts.netloc)
    except ValueError:
        good = False
    if not good:
        raise UsageError(
            f"engine {_shown(url)!r} names no HOST:PORT, such as {url.partition(':')[0]}://127.0.0.1:30000"
        )
    return parts.netloc


def _shown(url: str) -> str:
    """A URL as errors say it: without its parameters, and without a key that somebody put into it."""
    address = url.partition("?")[0]
    return re.sub(r"(?<=[:/])[^/]*@", "***@", address) if "@" in address else address


def _group(text: str) -> int:
    return 1 if text == "off" else _positive(text)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise UsageError(f"n= and interval= are at least 1, not {value}")
    return value


def _key(parameters: dict[str, str], variable: str) -> dict[str, str]:
    """The header with the API key from a file or the environment; nothing when there is none.

    Raises:
        UsageError: the key is in the URL, or its file cannot be read.
    """
    for name in ("key", "api_key", "token"):
        if name in parameters:
            raise UsageError(f"an engine URL holds no key: put it into {variable}, or into a file (key_file=PATH)")
    path = parameters.pop("key_file", None)
    try:
        key = Path(path).expanduser().read_text(encoding="utf-8").strip() if path else os.environ.get(variable, "")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read key_file {path}: {getattr(error, 'strerror', None) or error}") from error
    if path and not key:
        raise UsageError(f"key_file {path} is empty")
    if not key.isprintable():
        raise UsageError(f"the key in {path or variable} is more than one line")
    return {"Authorization": f"Bearer {key}"} if key else {}


# -- recorded ----------------------------------------------------------------------------------------------------------


def _replay(url: str, target: str, parameters: dict[str, str]) -> Engine:
    if not target:
        raise UsageError(
            "a replay engine needs recorded samples: replay:FILE.jsonl, such as replay:runs/A/samples.jsonl"
        )
    values = _take(parameters, {"rate": float})
    from orchestra.runtime.replay import ReplayEngine

    return ReplayEngine(target, **values)


_OPENERS: Mapping[str, Callable[[str, str, dict[str, str]], Engine]] = {
    "demo": _demo,
    "local": _local,
    "sglang": _sglang,
    "openai": _openai,
    "openais": _openai,
    "replay": _replay,
}
