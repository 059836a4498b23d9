"""Rewards of rollouts: functions of an `Outcome`, to be used alone, in TRL, or by `orchestra train grpo`.

A reward is a function `(outcome, *, correct, item, **parameters) -> float`. `correct` is what the task's grader says
(None: it could not be graded), `item` the task's item; a function that does not need them takes `**_`. One of your own
is named by its dotted path, `my_package.rewards:brevity`: it is imported, never evaluated.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from orchestra.errors import UsageError, one_of
from orchestra.evaluation.tasks import Item
from orchestra.graph import ThreadGraph
from orchestra.outcome import Outcome
from orchestra.protocols import PROTOCOLS, transcript

Variant = Literal["paper", "code", "readme"]


class Reward(Protocol):
    """See the module."""

    def __call__(self, outcome: Outcome, *, correct: bool | None, item: Item | None, **parameters: Any) -> float:
        """The reward of one rollout."""


def correctness(outcome: Outcome, *, correct: bool | None, right: float = 1.0, wrong: float = 0.0, **_: Any) -> float:
    """`right` for a correct answer, else `wrong`; what could not be graded is not correct."""
    return right if correct else wrong


def acceleration(
    outcome: Outcome,
    *,
    correct: bool | None,
    variant: Variant = "paper",
    rho: float = 0.5,
    clip: float = 0.2,
    **_: Any,
) -> float:
    """ThreadWeaver's bonus for a correct answer on a short critical path (arXiv:2512.07843, eq. 5 to 8).

    With L the longest path and T all tokens, both sampled: the paper's is min(rho (1 - L / T), clip); the published
    code's rho min(1 - L / T, clip), which is at most rho x clip; that of its README rho min(T / L - 1, clip).

    Raises:
        UsageError: an unknown variant.
    """
    longest, total = outcome.usage.critical_path_tokens, outcome.usage.sampled_tokens
    return accelerated(longest, total, variant, rho, clip) if correct else 0.0


def accelerated(longest: float, total: float, variant: Variant = "paper", rho: float = 0.5, clip: float = 0.2) -> float:
    """The formula of `acceleration`, from the longest path and all tokens; see `thread_lengths` for those of a text."""
    if not longest or not total:
        return 0.0
    saved = 1 - longest / total
    if variant == "paper":
        return min(rho * saved, clip)
    if variant == "code":
        return rho * min(saved, clip)
    if variant == "readme":
        return rho * min(total / longest - 1, clip)
    raise UsageError(one_of("variant of the acceleration reward", variant, ("paper", "code", "readme")))


def concurrency(
    outcome: Outcome, *, correct: bool | None, workers: int = 4, threshold: float = 1.0, always: bool = True, **_: Any
) -> float:
    """AsyncThink's reward for workers that think at the same time (arXiv:2510.26658): min(eta / workers, t) / t.

    `eta` is the mean number of active threads along the critical path, each saying a token a tick: sampled tokens over
    those of the critical path. It cannot be farmed beyond the `threshold` t, a share of the pool.

    Args:
        outcome: of the rollout.
        correct: whether its answer is.
        workers: the size of the pool.
        threshold: t, above 0 and at most 1.
        always: False: only for correct answers.
    """
    longest = outcome.usage.critical_path_tokens
    if not longest or not (correct or always):
        return 0.0
    return min(outcome.usage.sampled_tokens / longest / workers, threshold) / threshold


def well_formed(
    outcome: Outcome, *, protocol: str, right: float = 0.0, wrong: float = -1.0, each: float = 0.0, **_: Any
) -> float:
    """`right` for a text that keeps the rules of a protocol; else `wrong`, and `each` on top for every problem in it.

    Raises:
        UsageError: an unknown protocol.
    """
    found = problems(outcome, protocol)
    return wrong + each * found if found else right


def problems(outcome: Outcome, protocol: str) -> int:
    """How often the text of a rollout breaks the rules of a protocol of `orchestra.protocols`.

    The protocol is asked about what stands on the chosen thread, joined branches included.

    Raises:
        UsageError: an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(one_of("protocol", protocol, PROTOCOLS))
    return len(PROTOCOLS[protocol].validate(outcome.text or transcript(outcome.graph)))


def children(graph: ThreadGraph) -> int:
    """How many threads a rollout spawned beside its own: threads that begin to sample and end in another one.

    A thread is counted once, however many turns it takes; one that runs alone has none.
    """
    return max(0, len({tuple(node.path) for node in graph.nodes if node.count("sampled")}) - 1)


def thread_lengths(text: str, count: Callable[[str], int]) -> tuple[int, int]:
    """Longest path and all tokens of a ThreadWeaver text, by the definition of its published one-pass parser.

    Tokens outside of blocks, and for each block what lies outside of its threads and the longest of them, the tags of
    a thread included. A block that does not end is closed by the end of the text; tags inside of a thread are text.

    Args:
        text: a response.
        count: how many tokens a piece of text has, such as `lambda text: len(tokenizer.encode(text))`.

    Returns:
        `(longest, total)`.
    """
    total = longest = 0
    inside, threads = False, [0]
    for kind, piece in _pieces(text):
        size = count(piece)
        total += size
        if kind == "thread" and inside:
            threads.append(size)
            continue
        longest += size
        if kind == "open":
            inside = True
        elif kind == "close" and inside:
            longest, inside, threads = longest + max(threads), False, [0]
    return longest + max(threads), total


def _pieces(text: str) -> list[tuple[str, str]]:
    """A text cut at the tags of blocks and threads; a thread is one piece."""
    tags = re.compile(r"(?P<thread><Thread>.*?(?:</Thread>|\Z))|(?P<open><Parallel>)|(?P<close></Parallel>)", re.S)
    found, at = [], 0
    for match in tags.finditer(text):
        if match.start() > at:
            found.append(("text", text[at : match.start()]))
        found.append((match.lastgroup or "text", match.group()))
        at = match.end()
    return found + ([("text", text[at:])] if at < len(text) else [])


REWARDS: Mapping[str, Callable[..., float]] = {
    "correctness": correctness,
    "acceleration": acceleration,
    "concurrency": concurrency,
    "well_formed": well_formed,
}
"""The built-in ones by name."""


@dataclass(frozen=True)
class Part:
    """One reward of a weighted sum.

    Attributes:
        name: in the log.
        function: see the module.
        weight: its factor.
        parameters: further keyword arguments of the function.
    """

    name: str
    function: Callable[..., float]
    weight: float = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, outcome: Outcome, *, correct: bool | None = None, item: Item | None = None) -> float:
        """The reward, before it is weighed.

        Raises:
            UsageError: the function gave something else than a number.
        """
        value = self.function(outcome, correct=correct, item=item, **self.parameters)
        if not isinstance(value, int | float) or value != value:
            raise UsageError(f"reward {self.name} is a number, not {value!r:.60}")
        return float(value)


def part(spec: str | Mapping[str, Any]) -> Part:
    """A part from its form in a configuration: a name, or `{reward: NAME, weight: 0.5, PARAMETER: VALUE, ...}`.

    Raises:
        UsageError: no such reward, or a parameter that it does not have.
    """
    values = {"reward": spec} if isinstance(spec, str) else dict(spec)
    name, weight = values.pop("reward", None), values.pop("weight", 1.0)
    if not isinstance(name, str) or not isinstance(weight, int | float):
        raise UsageError(f"a reward is a name, or {{reward: NAME, weight: NUMBER, PARAMETER: VALUE}}, not {spec!r:.80}")
    function = REWARDS.get(name) or _imported(name)
    try:
        inspect.signature(function).bind(None, correct=None, item=None, **values)
    except TypeError as error:
        raise UsageError(f"reward {name}: {error}") from error
    return Part(name.rpartition(":")[2], function, float(weight), values)


def _imported(path: str) -> Callable[..., float]:
    module, colon, name = path.partition(":")
    if not colon:
        raise UsageError(one_of("reward", path, REWARDS) + "; one of your own is MODULE:FUNCTION")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"reward {path}: {error}") from error
    if not callable(function):
        raise UsageError(f"reward {path} is no function")
    found: Callable[..., float] = function
    return found


def total(parts: Sequence[Part], values: Sequence[float]) -> float:
    """The weighted sum."""
    return sum(each.weight * value for each, value in zip(parts, values, strict=True))
