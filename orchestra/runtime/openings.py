r"""What a model's folder says about the languages that it speaks: see `Engine.openings`.

It stands in ``config.json``, where it travels with the model::

    "orchestra": {"openings": {"thread_weaver": "\n<Parallel>\n<Outlines>", "drafts": "drafts:\n{answers}"}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY = "orchestra"
"""In ``config.json``."""


def openings_of(said: Any) -> Mapping[str, str]:
    """The openings in what stands under `KEY`; whatever has another shape is left out."""
    found = said.get("openings") if isinstance(said, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}


def openings_in(folder: str) -> Mapping[str, str]:
    """The openings of a model folder; none if it is not on this machine."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return openings_of(config.get(KEY)) if isinstance(config, dict) else {}
