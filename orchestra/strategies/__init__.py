"""The strategies: one method a file. Importing this package registers them all."""

from __future__ import annotations

from orchestra.strategies.base import Spec, Strategy, StrategyField, execute, registry, strategy
from orchestra.strategies.beam_search import BeamSearch
from orchestra.strategies.best_of import BestOf
from orchestra.strategies.first_finish import FirstFinish
from orchestra.strategies.sample import Sample
from orchestra.strategies.self_consistency import SelfConsistency
from orchestra.strategies.spawn_join import SpawnJoin

__all__ = [
    "BeamSearch",
    "BestOf",
    "FirstFinish",
    "Sample",
    "SelfConsistency",
    "SpawnJoin",
    "Spec",
    "Strategy",
    "StrategyField",
    "execute",
    "registry",
    "strategy",
]
