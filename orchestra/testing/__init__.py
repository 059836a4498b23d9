"""Laws and instruments for engines and strategies: what our own tests use, for anyone to use on theirs.

Torch is loaded only by the laws that compute with it.
"""

from __future__ import annotations

from orchestra.testing.agreement import check_agreement
from orchestra.testing.caching import (
    check_integrity,
    check_joined_cache_is_not_found,
    check_memory_limit,
    check_prefix_reuse,
)
from orchestra.testing.concurrent import check_concurrent_parity
from orchestra.testing.conformance import check_engine
from orchestra.testing.graphs import Played, Step, play, random_graph, random_program
from orchestra.testing.laws import (
    CLOSE_CALL,
    LOGIT_TOLERANCE,
    check_conservation,
    check_greedy,
    check_no_leak,
    check_parity,
    check_schedule_invariance,
)
from orchestra.testing.losslessness import ATTENTION_TOLERANCE, check_losslessness
from orchestra.testing.scripted import ScriptedEngine
from orchestra.testing.strategies import check_strategy

__all__ = [
    "ATTENTION_TOLERANCE",
    "CLOSE_CALL",
    "LOGIT_TOLERANCE",
    "Played",
    "ScriptedEngine",
    "Step",
    "check_agreement",
    "check_concurrent_parity",
    "check_conservation",
    "check_engine",
    "check_greedy",
    "check_integrity",
    "check_joined_cache_is_not_found",
    "check_losslessness",
    "check_memory_limit",
    "check_no_leak",
    "check_parity",
    "check_prefix_reuse",
    "check_schedule_invariance",
    "check_strategy",
    "play",
    "random_graph",
    "random_program",
]
