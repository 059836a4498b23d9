"""What a strategy is, how it gets a name, and how one is executed."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, SerializeAsAny, create_model

from orchestra.budget import Budget
from orchestra.errors import BudgetExceeded, CapabilityError, UsageError
from orchestra.outcome import Candidate, Outcome, Usage
from orchestra.run import Scope, current_scope, frontier
from orchestra.runtime.engine import Capability
from orchestra.spec import Named, parse_strategy
from orchestra.thread import BudgetCut, Thread

_IN_PROCESS = frozenset(
    {Capability.SEED, Capability.REUSE_JOIN, Capability.CONCURRENT_CACHE, Capability.STREAMS}
)  # no server's


class Strategy(Named):
    """A strategy: parameters as fields, and one coroutine from a thread to a thread or an outcome.

    Subclasses are registered under the class name in snake case, or a `name` of their own, and can then be named in
    specs (one that sets `abstract = True` for itself is not).

    Attributes:
        name: its name in specs.
        needs: what the engine must be able to do.
        paper: where it comes from.
    """

    kind = "strategy"
    example = "self_consistency(samples=8)"
    abstract = True

    async def __call__(self, thread: Thread) -> Thread | Outcome:
        """Run from `thread`."""
        raise NotImplementedError(f"strategy {self.name!r} defines no __call__")  # abstract: each strategy's own

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """Index of the best of at least one candidate; also asked when a budget ends the run early.

        By default the highest weight, the earliest of equals.
        """
        return max(range(len(candidates)), key=lambda i: candidates[i].weight)

    def conclude(self, candidates: Sequence[Candidate]) -> Outcome:
        """The outcome of choosing from at least one candidate."""
        best = candidates[self.choose(candidates)]
        return Outcome(
            text=best.text, answer=best.answer, candidates=list(candidates), finish_reason=best.finish_reason
        )


Spec = Strategy | str | Mapping[str, Any]
StrategyField = Annotated[SerializeAsAny[Strategy], BeforeValidator(parse_strategy)]


def registry() -> dict[str, type[Strategy]]:
    """All strategies by name."""
    return Strategy.known()


def strategy(function: Callable[..., Awaitable[Thread | Outcome]]) -> type[Strategy]:
    """Make a strategy of a coroutine function whose first parameter is the thread; the others become its parameters.

    Raises:
        UsageError: not such a function, or its name is a built-in strategy's.
    """
    parameters = list(inspect.signature(function, eval_str=True).parameters.values())
    if not inspect.iscoroutinefunction(function) or not parameters:
        raise UsageError(f"@strategy takes a coroutine function whose first parameter is a thread, not {function!r}")
    fields: dict[str, Any] = {}
    for parameter in parameters[1:]:
        kind = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[parameter.name] = (kind, ... if parameter.default is parameter.empty else parameter.default)

    async def call(self: Strategy, thread: Thread) -> Thread | Outcome:
        return await function(thread, **{name: getattr(self, name) for name in fields})

    # The body goes into a plain base class, so that pydantic sees nothing but fields in the one with parameters.
    body = type("_Body", (Strategy,), {"__call__": call, "__module__": function.__module__, "abstract": True,
                                       "__annotations__": {"abstract": ClassVar[bool]}})  # fmt: skip
    return create_model(
        function.__name__, __base__=body, __module__=function.__module__, __doc__=function.__doc__, **fields
    )


async def execute(spec: Spec, thread: Thread, budget: Budget | None = None) -> Outcome:
    """Run a strategy from a thread to its outcome, within a budget.

    Raises:
        SpecError: see `parse_strategy`.
        CapabilityError: the engine cannot do what it needs.
        UsageError: it names an engine that the connection does not have.
    """
    chosen = parse_strategy(spec if isinstance(spec, Strategy | str) else dict(spec))
    _require(chosen, thread)
    scope = Scope(thread._run, current_scope.get(), budget)
    token = current_scope.set(scope)
    stopped: BudgetExceeded | None = None
    result: Thread | Outcome
    try:
        result = await _call(chosen, thread, scope)
    except BudgetExceeded as spent:
        if spent.ledger is not scope.ledger:
            raise
        stopped, result = spent, _salvage(chosen, thread, scope, spent)
        # Whatever comes next comes after all that was tried here.
        frontier.set(frontier.get() | {node.id for node in scope.nodes})
    finally:
        current_scope.reset(token)
    if scope.parent is None:
        await thread._run.end_background()
    return _finish(result, thread, scope, stopped)


def _require(chosen: Strategy, thread: Thread) -> None:
    for alias in chosen.aliases():
        thread._run.engine_for(alias)  # a wrong one is an error now, not after what comes before its use
    engine = thread._run.engine_for(thread._alias)
    missing = sorted(chosen.requirements() - engine.capabilities)
    if missing:
        able = "local:PATH" if _IN_PROCESS.intersection(missing) else "local:PATH and sglang://HOST:PORT"
        why = " (recorded samples cannot be continued or scored)" if engine.recorded else ""
        raise CapabilityError(f"{chosen.name} needs {', '.join(missing)}, which {engine.name} cannot{why}; {able} can")


async def _call(chosen: Strategy, thread: Thread, scope: Scope) -> Thread | Outcome:
    """Call the strategy within its wall-clock budget."""
    limit = scope.ledger.budget.wall_seconds
    timer = None
    try:
        async with thread._run.clock.timeout(limit) as timer:
            return await chosen(thread)
    except TimeoutError:
        if timer is None or not timer.expired():
            raise
        raise BudgetExceeded("wall_seconds", limit or 0, scope.ledger) from None


def _salvage(chosen: Strategy, thread: Thread, scope: Scope, spent: BudgetExceeded) -> Thread | Outcome:
    """The best there is when a budget has ended: what was offered, else the strategy's own unfinished thread."""
    if scope.offers:
        return chosen.conclude(scope.offers)
    if isinstance(spent, BudgetCut) and spent.thread.path == thread.path:
        return spent.thread
    return Outcome()


def _finish(result: Thread | Outcome, thread: Thread, scope: Scope, stopped: BudgetExceeded | None) -> Outcome:
    run = thread._run
    if isinstance(result, Thread):
        candidate = result.candidate()
        outcome = Outcome(
            text=result.text, answer=candidate.answer, candidates=[candidate], finish_reason=result.finish_reason
        )
        outcome._thread = result
    elif isinstance(result, Outcome):
        outcome = result
    else:
        raise UsageError(f"a strategy returns a Thread or an Outcome, not {type(result).__name__}")
    outcome.usage = Usage.of(
        scope.nodes,
        critical_path_tokens=max(0, run.chains.depth(frontier.get()) - scope.base),
        sequential_tokens=max(0, run.chains.sequential(frontier.get()) - scope.base_sequential),
        total_tokens=run.chains.total(scope.nodes),
        wall_seconds=run.clock.now() - scope.began,
    )
    outcome.graph = run.graph
    outcome.stopped_by = stopped.limit if stopped else outcome.stopped_by
    return outcome
