"""Orchestra makes one language model think in parallel."""

from __future__ import annotations

from orchestra.api import Connection, connect, run
from orchestra.budget import Budget
from orchestra.errors import OrchestraError
from orchestra.graph import Node, Span, ThreadGraph
from orchestra.outcome import Candidate, Outcome, Usage
from orchestra.run import Event
from orchestra.spec import parse_budget, parse_strategy
from orchestra.strategies import (
    AsyncThink,
    BeamSearch,
    BestOf,
    BudgetForcing,
    Cautious,
    ConfidenceVote,
    FirstFinish,
    MapReduce,
    Pdr,
    PowerMh,
    PowerSmc,
    Refine,
    RewardSmc,
    Sample,
    Scorer,
    SelfConsistency,
    SpawnJoin,
    Strategy,
    ThreadWeaver,
    strategy,
)
from orchestra.thread import Thread
from orchestra.threads import Threads

__version__ = "0.1.0"

__all__ = [
    "AsyncThink",
    "BeamSearch",
    "BestOf",
    "Budget",
    "BudgetForcing",
    "Candidate",
    "Cautious",
    "ConfidenceVote",
    "Connection",
    "Event",
    "FirstFinish",
    "MapReduce",
    "Node",
    "OrchestraError",
    "Outcome",
    "Pdr",
    "PowerMh",
    "PowerSmc",
    "Refine",
    "RewardSmc",
    "Sample",
    "Scorer",
    "SelfConsistency",
    "Span",
    "SpawnJoin",
    "Strategy",
    "Thread",
    "ThreadGraph",
    "ThreadWeaver",
    "Threads",
    "Usage",
    "connect",
    "parse_budget",
    "parse_strategy",
    "run",
    "strategy",
]
