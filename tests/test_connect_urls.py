"""From a URL to an engine: every scheme and parameter, and errors that say what would be right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from orchestra.errors import MissingExtraError, UsageError
from orchestra.runtime import sglang_server
from orchestra.runtime.connect import open_engine
from orchestra.runtime.forms import ENGINES
from orchestra.runtime.limits import Limits
from orchestra.runtime.openai import OpenAIEngine
from orchestra.runtime.sglang import SGLangEngine
from orchestra.runtime.sglang_owned import OwnedSGLangEngine
from orchestra.runtime.sglang_server import FLAGS, SGLangServer

LIMITS = "concurrency=3&rate=1.5&retries=4&timeout=7&patience=8"


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "SGLANG_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def owned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """SGLang is there, so far as the URL is concerned; logs go to a folder of the test's."""
    monkeypatch.setattr(sglang_server, "find_spec", lambda name: object())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda url: open_engine(url)._process


def refused(url: str) -> str:
    with pytest.raises(UsageError) as error:
        open_engine(url)
    text = str(error.value)
    assert "\n" not in text
    return text


# -- servers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["127.0.0.1:30000", "host", "some.host:1", "[::1]:30000"])
def test_a_running_sglang_server(where: str) -> None:
    engine = open_engine(f"sglang://{where}")
    assert type(engine) is SGLangEngine
    assert (engine.name, engine.server.base, engine.server.limits) == (f"sglang://{where}", f"http://{where}", Limits())
    assert engine.group == 256
    assert open_engine(f"sglang://{where}/").server.base == f"http://{where}"


def test_sglang_parameters() -> None:
    engine = open_engine(f"sglang://h:1?model=a/b-c&n=8&interval=5&tokenizer=/t&{LIMITS}")
    assert engine.server.limits == Limits(3, 1.5, 4, 7.0, 8.0)
    assert (engine.group, engine._interval, engine._model, engine._tokenizer) == (8, 5, "a/b-c", "/t")
    assert open_engine("sglang://h:1?n=off").group == 1


@pytest.mark.parametrize(("scheme", "secure"), [("openai", "http"), ("openais", "https")])
@pytest.mark.parametrize(
    ("path", "prefix"), [("", "/v1"), ("/", "/v1"), ("/v1", "/v1"), ("/v1/", "/v1"), ("/a/v2", "/a/v2")]
)
def test_an_openai_server(scheme: str, secure: str, path: str, prefix: str) -> None:
    engine = open_engine(f"{scheme}://h:8000{path}?model=m&api=chat&continue=on&n=2&{LIMITS}")
    assert type(engine) is OpenAIEngine
    assert engine.name == f"{scheme}://h:8000{prefix}"
    assert engine.server.base == f"{secure}://h:8000"
    assert (engine._prefix, engine.model, engine._api, engine._continues) == (prefix, "m", "chat", True)
    assert engine._asked_group == 2
    assert engine.server.limits == Limits(3, 1.5, 4, 7.0, 8.0)


@pytest.mark.parametrize("scheme", ["sglang", "openai", "openais"])
@pytest.mark.parametrize(
    "where",
    ["//", "//:30000", "//h:", "//h:port", "//h:99999", "//h:-1", "//[::1", "//h:80 ", "//ex\u2100mple:1", "///v1"],
)
def test_a_server_without_a_good_address(scheme: str, where: str) -> None:
    assert f"names no HOST:PORT, such as {scheme}://127.0.0.1:30000" in refused(f"{scheme}:{where}")


def test_sglang_has_no_path() -> None:
    assert "sglang://h:1, without a path; openai://h:1/v1 has one" in refused("sglang://h:1/v1")
    assert "sglang://HOST:PORT" in refused("sglang:")
    assert "names no HOST:PORT" in refused("openai:h:8000")


# -- what is not there -------------------------------------------------------------------------------------------------


def test_unknown_schemes_list_the_known() -> None:
    text = refused("sglagn://h:1")
    assert "unknown engine 'sglagn'; did you mean 'sglang'?" in text
    assert "(known: demo, local, openai, openais, replay, sglang)" in text
    for url in ("", "h:1", "SGLANG://h:1", "http://h:1/v1"):
        assert "(known: demo, local" in refused(url)
    assert {form.url.partition(":")[0] for form in ENGINES} | {"openais"} == {
        *("demo", "local", "openai", "openais", "replay", "sglang")
    }


@pytest.mark.parametrize(
    ("url", "known"),
    [
        ("demo?", "device, dtype, forward, kernel, max_batch, memory, prefill, prefix_cache"),
        ("local:x?", "adapter, device, dtype, forward, kernel, max_batch, memory, prefill, prefix_cache, streams"),
        ("sglang://h:1?", "concurrency, interval, key_file, model, n, patience, rate, retries, timeout, tokenizer"),
        ("openai://h:1?", "api, concurrency, continue, key_file, model, n, patience, rate, retries, timeout"),
    ],
)
def test_unknown_parameters_list_the_known(url: str, known: str) -> None:
    assert refused(url + "x=1").endswith(f"unknown engine parameter 'x' (known: {known})")
    assert "unknown engine parameter 'TP'" in refused(url + "TP=2")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("demo:x", "one model: demo, not 'demo:x'; local:PATH_OR_ID"),
        ("local:", "local:PATH_OR_ID"),
        ("demo?memory=lots", "memory = 'lots' is not a number"),
        ("sglang://h:1?n=many", "n = 'many' is not a number"),
        ("sglang://h:1?n=0", "at least 1, not 0"),
        ("sglang://h:1?interval=-1", "at least 1, not -1"),
        ("openai://h:1?n=-2", "at least 1, not -2"),
        ("openai://h:1?api=soap", "one of auto, chat, completions, not 'soap'"),
        ("openai://h:1?continue=yes", "one of on, off, not 'yes'"),
        ("openai://h:1?concurrency=0", "concurrency is at least 1, not 0"),
        ("sglang://h:1?timeout=", "timeout = '' is not a number"),
        ("sglang://h:1?rate=nan", "rate is at least 0"),
    ],
)
def test_bad_values_say_what_is_right(url: str, message: str) -> None:
    assert message in refused(url)


# -- keys --------------------------------------------------------------------------------------------------------------

SECRET = "sk-very-secret"


@pytest.mark.parametrize("scheme", ["sglang", "openai", "openais"])
@pytest.mark.parametrize(
    "rest",
    [
        f"//{SECRET}@h:1",
        f"//user:{SECRET}@h:1/v1",
        f"//:{SECRET}@h:1",
        f"//h:1?key={SECRET}",
        f"//h:1?api_key={SECRET}",
        f"//h:1?model=m&token={SECRET}",
    ],
)
def test_keys_in_urls_are_refused(scheme: str, rest: str) -> None:
    text = refused(f"{scheme}:{rest}")
    assert "holds no key" in text
    assert "key_file=PATH" in text
    assert SECRET not in text


@pytest.mark.parametrize(
    "url",
    [
        f"opnai://{SECRET}@h:1/v1",
        f"opnai://user:{SECRET}@h:1/v1",
        f"opnai://h:1?api_key={SECRET}",
        f"openai://h:99999?api_key={SECRET}",
        f"openai://user:{SECRET}@h:99999/v1",
        f"openai://h:1?apikey={SECRET}",
        f"openai:user:{SECRET}@h:1",
        f"demo:x?key={SECRET}",
        f"replay:x?key={SECRET}",
        f"local:?key={SECRET}",
    ],
)
def test_no_error_repeats_a_key(url: str) -> None:
    assert SECRET not in refused(url)


@pytest.mark.parametrize(("url", "variable"), [("openai://h:1", "OPENAI_API_KEY"), ("sglang://h:1", "SGLANG_API_KEY")])
def test_keys_come_from_the_environment_or_a_file(
    url: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_engine(url).server.headers == {}
    monkeypatch.setenv(variable, "from-env")
    assert open_engine(url).server.headers == {"Authorization": "Bearer from-env"}
    file = tmp_path / "key"
    file.write_text("  from-file\n")
    engine = open_engine(f"{url}?key_file={file}")
    assert engine.server.headers == {"Authorization": "Bearer from-file"}
    assert "from-" not in repr(engine) + repr(engine.server) + repr(engine.facts()) + engine.name
    file.write_text("\n")
    assert "is empty" in refused(f"{url}?key_file={file}")
    file.write_text(f"{SECRET}\nand more\n")
    assert "more than one line" in (text := refused(f"{url}?key_file={file}"))
    assert SECRET not in text
    file.write_bytes(b"\xff\xfe")
    assert "cannot read key_file" in refused(f"{url}?key_file={file}")
    assert "No such file" in refused(f"{url}?key_file={tmp_path / 'none'}")


# -- servers of our own ------------------------------------------------------------------------------------------------


def test_flags_reach_the_command_line(owned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "_GPU_DEVICES", ("/",))
    parameters = {name: f"v{i}" for i, name in enumerate(FLAGS)}
    query = "&".join(f"{name}={value}" for name, value in parameters.items())
    process = owned(f"sglang:org/model?{query}")
    command = process.command()
    assert command[:5] == [sys.executable, "-m", "sglang.launch_server", "--model-path", "org/model"]
    for name, value in parameters.items():
        assert command[command.index(FLAGS[name]) + 1] == value
    assert command[command.index("--port") + 1] == str(process.port)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert "--incremental-streaming-output" in command
    assert "--tensor-parallel-size" in command
    assert "--disable-cuda-graph" not in command
    assert process.process is None, "nothing is started before the engine is opened"


def test_without_a_gpu_the_server_runs_on_the_cpu(owned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "_GPU_DEVICES", ("/no/such/device",))
    command = owned("sglang:m?mem_fraction_static=0.5").command()
    for flag, value in [
        ("--device", "cpu"),
        ("--attention-backend", "torch_native"),
        ("--sampling-backend", "pytorch"),
        ("--mem-fraction-static", "0.5"),
    ]:
        assert command[command.index(flag) + 1] == value
        assert command.count(flag) == 1
    assert {"--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle"} < set(command)
    monkeypatch.setattr(sglang_server, "_GPU_DEVICES", ("/",))
    command = owned("sglang:m").command()
    assert command[command.index("--device") + 1] == "cuda"
    assert "torch_native" not in command
    assert "torch_native" in owned("sglang:m?device=cpu").command()


def test_an_owned_server_has_limits_and_options_too(owned: Any) -> None:
    engine = open_engine(f"sglang:/some/folder?tp=2&n=off&interval=3&{LIMITS}")
    assert type(engine) is OwnedSGLangEngine
    assert engine.name == "sglang:/some/folder"
    assert engine.server.base == f"http://127.0.0.1:{engine._process.port}"
    assert engine.server.limits == Limits(3, 1.5, 4, 7.0, 8.0)
    assert (engine.group, engine._interval, engine._process.model) == (1, 3, "/some/folder")
    assert open_engine("sglang:demo")._process.model.endswith("embedded")
    assert "unknown engine parameter 'key_file'" in refused("sglang:m?key_file=x"), "it listens to nobody else"
    text = refused("sglang:m?tpp=2")
    assert "unknown engine parameter 'tpp'; did you mean 'tp'?" in text
    assert all(name in text for name in FLAGS)


def test_without_sglang_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="sglang"):
        open_engine("sglang:m")
    with pytest.raises(MissingExtraError, match="sglang"):
        SGLangServer("m")


def test_what_the_in_process_engine_can_is_told():
    from orchestra.runtime.local.engine import LocalEngine

    told = {form.url.partition(":")[0]: set(form.can.split(", ")) for form in ENGINES}
    assert told["demo"] == told["local"] == {str(capability) for capability in LocalEngine.capabilities}
