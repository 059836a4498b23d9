"""The strategies: one method a file. Importing this package registers them all."""

from __future__ import annotations

from orchestra.strategies.async_think import AsyncThink
from orchestra.strategies.base import Spec, Strategy, StrategyField, execute, registry, strategy
from orchestra.strategies.beam_search import BeamSearch
from orchestra.strategies.best_of import BestOf
from orchestra.strategies.budget_forcing import BudgetForcing
from orchestra.strategies.cautious import Cautious
from orchestra.strategies.confidence_vote import ConfidenceVote
from orchestra.strategies.first_finish import FirstFinish
from orchestra.strategies.hogwild import Hogwild
from orchestra.strategies.map_reduce import MapReduce
from orchestra.strategies.parallel_streams import ParallelStreams
from orchestra.strategies.pdr import Pdr
from orchestra.strategies.power_mh import PowerMh
from orchestra.strategies.power_smc import PowerSmc
from orchestra.strategies.refine import Refine
from orchestra.strategies.reward_smc import RewardSmc
from orchestra.strategies.sample import Sample
from orchestra.strategies.scorers import Scorer
from orchestra.strategies.self_consistency import SelfConsistency
from orchestra.strategies.spawn_join import SpawnJoin
from orchestra.strategies.threads import ThreadWeaver

__all__ = [
    "AsyncThink",
    "BeamSearch",
    "BestOf",
    "BudgetForcing",
    "Cautious",
    "ConfidenceVote",
    "FirstFinish",
    "Hogwild",
    "MapReduce",
    "ParallelStreams",
    "Pdr",
    "PowerMh",
    "PowerSmc",
    "Refine",
    "RewardSmc",
    "Sample",
    "Scorer",
    "SelfConsistency",
    "SpawnJoin",
    "Spec",
    "Strategy",
    "StrategyField",
    "ThreadWeaver",
    "execute",
    "registry",
    "strategy",
]
