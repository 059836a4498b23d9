"""Where models, adapters and tokenizers come from: a folder, which never asks the network, or a Hugging Face id."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from orchestra.errors import UsageError

_ADAPTER = "adapter_config.json"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Source:
    """What to load.

    Attributes:
        model: folder or Hugging Face id of the model.
        adapter: folder of a PEFT adapter to put on it.
    """

    model: str
    adapter: str | None = None

    @classmethod
    def of(cls, source: str, adapter: str | None = None) -> Source:
        """The model and adapter that are meant.

        Args:
            source: a model folder or id; or an adapter folder, which names its base model itself.
            adapter: an adapter folder for the model at `source`.

        Raises:
            UsageError: no such folder, or an adapter's base model is not where it says.
        """
        folder = Path(source).expanduser()
        if adapter is None and not (folder / _ADAPTER).is_file():
            return cls(source)
        if adapter is not None:
            if (folder / _ADAPTER).is_file():
                raise UsageError(f"{source} is an adapter itself; adapter={adapter} needs the model under it")
            if not (Path(adapter).expanduser() / _ADAPTER).is_file():
                raise UsageError(f"{adapter} is not an adapter folder: it has no {_ADAPTER}")
            return cls(source, str(Path(adapter).expanduser()))
        return cls(_base(folder), str(folder))

    @property
    def tokenizer(self) -> str:
        """Where its tokenizer is: beside the adapter, if that brings one."""
        brings = self.adapter is not None and any((Path(self.adapter) / name).is_file() for name in _TOKENIZER)
        return self.adapter if self.adapter is not None and brings else self.model


def _base(adapter: Path) -> str:
    """The base model that an adapter names: an id, or a folder, also one relative to the adapter's."""
    try:
        base = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"cannot read {adapter / _ADAPTER}: {error}") from error
    name_it = f"name its base model yourself: local:MODEL?adapter={adapter}"
    if not base or not isinstance(base, str):
        raise UsageError(f"{adapter / _ADAPTER} names no base model; {name_it}")
    for folder in (Path(base).expanduser(), adapter / base):
        if folder.is_dir():
            return str(folder)
    if looks_local(base):
        raise UsageError(f"the adapter {adapter} belongs to {base}, which is not here; {name_it}")
    return base


def looks_local(source: str) -> bool:
    """Whether a source can only be a folder, and not a Hugging Face id."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or os.sep not in source


def local_folder(source: str) -> bool:
    """Whether the source is a folder; then the network is never asked."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{source} is not a model folder: it has no config.json")
        return True
    if path.exists():
        raise UsageError(f"{source} is a file, not a model folder")
    if looks_local(source):
        raise UsageError(f"no model folder {source!r} (a Hugging Face id has the form owner/name)")
    return False


def load_tokenizer(source: str | Source, config: Any = None) -> Any:
    """The tokenizer of a model folder or Hugging Face id, or of an adapter.

    Args:
        source: where it is.
        config: of the model, where it is not the one that lies there.

    Raises:
        UsageError: there is none.
    """
    if isinstance(source, str):
        source = Source(source)
    place = source.tokenizer
    local = place == source.adapter or local_folder(place)
    return read(lambda: transformers.AutoTokenizer.from_pretrained(place, config=config, local_files_only=local), place)


def tokenizer_at(place: str) -> Any:
    """The tokenizer in a folder, which needs no model beside it, or of a Hugging Face id.

    Raises:
        UsageError: there is none.
    """
    local = Path(place).is_dir()
    return read(lambda: transformers.AutoTokenizer.from_pretrained(place, local_files_only=local), place)


def read(load: Callable[[], Any], source: str, warn: bool = True) -> Any:
    """What `load` gives; quiet (without `warn` transformers' warnings are not shown either), and failures are one line.

    Raises:
        UsageError: it failed.
    """
    logging = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    try:
        logging.disable_progress_bar()
        if not warn:
            logging.set_verbosity_error()
        return load()
    except UsageError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        raise UsageError(f"cannot load {source}: {line[:300]}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
        if not warn:
            logging.set_verbosity(level)
