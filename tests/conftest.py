"""Tiny random models on disk, built once a session: nothing is downloaded."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL would tell its makers of every trainer that is made

# A job that a shell put in the background ignores Ctrl-C, and so would the processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = frozenset({"sglang_server", "tagged_server", "speaker"})
"""Fixtures that take long to set up: all tests with one of them run in one process."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests stay together when several processes run them side by side."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        shared = SHARED.intersection(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("shared" if shared else item.path.name))


WORDS = ["<pad>", "<bos>", "<eos>", "<unk>"]


TAGS = ["<Goal>", "</Goal>", "<Path>", "</Path>", "<|end|>"]


def byte_tokenizer(merges: bool = True, tags: bool = False) -> Any:
    """A byte-level BPE with a few merges: characters may span tokens, words may be one; `tags` are special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("a", "n"), ("Ġ", "a")] if merges else []
    tokens = [*WORDS, *alphabet, *(a + b for a, b in pairs)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    if tags:
        tokenizer.add_special_tokens(TAGS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def tiny_model(kind: str = "llama", heads: int = 4, key_heads: int = 2, vocabulary: int = 267, **options: Any) -> Any:
    """A random decoder of two layers whose greedy text is not constant."""
    import torch
    import transformers

    if kind in ("mistral", "phi3", "stablelm"):
        options = {"sliding_window": None, **options}
    config = transformers.AutoConfig.for_model(
        kind,
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.3,
            "tie_word_embeddings": False,
            **options,
        },
    )
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    return model


def save_model(folder: Path, kind: str = "llama", tags: bool = False, **options: Any) -> str:
    """Write a tiny model with its tokenizer; returns the folder. With `tags` it knows, and says, `TAGS`."""
    tokenizer = byte_tokenizer(tags=tags)
    model = tiny_model(kind, **({"vocabulary": len(tokenizer)} | options if tags else options))
    if tags:
        import torch

        with torch.no_grad():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(["<eos>", *TAGS])] *= 4.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`make_model(kind, **configuration)` gives the folder of a tiny model; each is built once."""
    made: dict[str, str] = {}

    def make(kind: str = "llama", **options: Any) -> str:
        key = f"{kind}{sorted(options.items())}"
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp(kind), kind, **options)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., str]) -> str:
    """The folder of a tiny Llama with grouped heads."""
    return make_model("llama")


@pytest.fixture(scope="session")
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a small Llama that speaks the plays of `plays.py`; trained once, then kept in pytest's cache.

    Beside it, in `special`, is the same model with its tags as special tokens.
    """
    from speaker import build

    cache = getattr(request.config, "cache", None)
    return str(build(cache.mkdir("speaker") if cache else tmp_path_factory.mktemp("speaker")))


@pytest.fixture(scope="session")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real SGLang server on the CPU with the embedded model, one for the session."""
    from orchestra.runtime.connect import EMBEDDED
    from orchestra.runtime.sglang_server import SGLangServer

    with started(SGLangServer, EMBEDDED, tmp_path_factory.mktemp("sglang") / "server.log") as server:
        yield server


@pytest.fixture(scope="session")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that often says special tokens, and ends."""
    return save_model(tmp_path_factory.mktemp("tagged"), tags=True)


@pytest.fixture(scope="session")
def tagged_server(tagged: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The same model on a real SGLang server, one for the session."""
    from orchestra.runtime.sglang_server import SGLangServer

    with started(SGLangServer, tagged, tmp_path_factory.mktemp("sglang") / "server.log") as running:
        yield running


@contextmanager
def started(kind: Any, model: Any, log: Path, port: int = 0) -> Iterator[Any]:
    """A server of our own; where SGLang is not installed the test is skipped, or fails if it must not be."""
    if find_spec("sglang") is None:
        reason = "SGLang is not installed here: make .venv/.sglang"
        pytest.fail(reason) if os.environ.get("ORCHESTRA_REQUIRE_SGLANG") else pytest.skip(reason)
    flags = {"device": "cpu", "dtype": "float32", "max_total_tokens": "65536"}
    server = kind(str(model), port=port, flags=flags, log=log)
    server.start()
    try:
        asyncio.run(server.ready(240))
        yield server
    finally:
        server.stop()
