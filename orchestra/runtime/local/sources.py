"""Where models and tokenizers come from: a folder, which never asks the network, or a Hugging Face id."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from orchestra.errors import UsageError


def local_folder(source: str) -> bool:
    """Whether the source is a folder; then the network is never asked."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1 or os.sep not in source
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"{source} is not a model folder: it has no config.json")
        return True
    if path.exists():
        raise UsageError(f"{source} is a file, not a model folder")
    if looks_local:
        raise UsageError(f"no model folder {source!r} (a Hugging Face id has the form owner/name)")
    return False


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a model folder or Hugging Face id.

    Raises:
        UsageError: there is none.
    """
    local = local_folder(source)
    return read(lambda: transformers.AutoTokenizer.from_pretrained(source, local_files_only=local), source)


def read(load: Callable[[], Any], source: str) -> Any:
    """What `load` gives; quiet, and every failure one line.

    Raises:
        UsageError: it failed.
    """
    bars = transformers.utils.logging.is_progress_bar_enabled()
    try:
        transformers.utils.logging.disable_progress_bar()
        return load()
    except UsageError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        raise UsageError(f"cannot load {source}: {line[:300]}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
