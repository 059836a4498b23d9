"""Training: thread graphs as rows, batches of them, trainers on TRL. Names load what they need when they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_NAMES = {
    "Row": "flatten",
    "dense_mask": "flatten",
    "Unit": "trie",
    "merge": "trie",
    "merge_graph": "trie",
    "graph_of": "graphs",
    "GraphCollator": "collate",
    "weighted_loss": "collate",
    "WeightedSFTTrainer": "trainer",
    "add_tags": "vocabulary",
    "from_run": "rejection",
    "GraphGRPOTrainer": "grpo",
    "Player": "rollouts",
    "Arm": "rollouts",
    "correctness": "rewards",
    "acceleration": "rewards",
    "concurrency": "rewards",
    "well_formed": "rewards",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
