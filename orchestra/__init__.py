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
    BeamSearch,
    BestOf,
    FirstFinish,
    Sample,
    SelfConsistency,
    SpawnJoin,
    Strategy,
    strategy,
)
from orchestra.thread import Thread, Threads

__version__ = "0.1.0"

__all__ = [
    "BeamSearch",
    "BestOf",
    "Budget",
    "Candidate",
    "Connection",
    "Event",
    "FirstFinish",
    "Node",
    "OrchestraError",
    "Outcome",
    "Sample",
    "SelfConsistency",
    "Span",
    "SpawnJoin",
    "Strategy",
    "Thread",
    "ThreadGraph",
    "Threads",
    "Usage",
    "connect",
    "parse_budget",
    "parse_strategy",
    "run",
    "strategy",
]
