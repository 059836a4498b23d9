"""Rollouts for reinforcement learning: strategies run on an engine, many at a time, whatever happens to the engine.

A `Player` owns the connection. It lives on an event loop of its own, so that a trainer, which has none, can ask for
rollouts and wait. A rollout is played again when the engine failed; an engine that is gone is waited for, opened anew
and given the weights again; and what a server sampled before it was found to have begun anew is thrown away.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orchestra.answers import Extractor, extract_answer
from orchestra.api import Connection, connect
from orchestra.concurrency import first_error
from orchestra.errors import EngineDown, EngineError, UsageError
from orchestra.evaluation.runner import sample_seed
from orchestra.evaluation.tasks import Item
from orchestra.outcome import Outcome
from orchestra.runtime.engine import Engine
from orchestra.spec import parse_budget, parse_strategy
from orchestra.strategies.base import Spec, Strategy

T = TypeVar("T")

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0


@dataclass(frozen=True)
class Arm:
    """A strategy that rollouts are made with, and its share of the prompts.

    Attributes:
        strategy: which.
        share: relative to the other arms' shares.
        draw: parameters that are drawn for each prompt, one for its group: `{"children": [None, 4, 8]}` is APR's
            conditioning on the number of children.
    """

    strategy: Strategy
    share: float = 1.0
    draw: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Spec | Mapping[str, Any]) -> Arm:
        """From its form in a configuration: a spec, or `{strategy: SPEC, share: 0.5, draw: {children: [4, 8]}}`.

        Raises:
            UsageError: it is neither.
        """
        if isinstance(spec, Mapping) and (spec.keys() == {"strategy"} or {"share", "draw"} & spec.keys()):
            unknown = spec.keys() - {"strategy", "share", "draw"}
            draw, share = spec.get("draw") or {}, spec.get("share", 1.0)
            if unknown or not isinstance(draw, Mapping) or not all(isinstance(v, list) and v for v in draw.values()):
                raise UsageError(f"an arm is {{strategy: SPEC, share: 0.5, draw: {{NAME: [VALUE]}}}}, not {spec!r:.80}")
            arm = cls(parse_strategy(spec["strategy"]), float(share), dict(draw))
        else:
            arm = cls(parse_strategy(dict(spec) if isinstance(spec, Mapping) else spec))
        if not arm.share > 0:
            raise UsageError(f"the share of {arm.strategy.name} is above 0, not {arm.share:g}")
        for name, values in arm.draw.items():
            for value in values:
                arm._with({name: value})  # a wrong one is an error now
        return arm

    def strategy_for(self, chance: random.Random) -> Strategy:
        """The strategy of one prompt."""
        return self._with({name: chance.choice(list(values)) for name, values in sorted(self.draw.items())})

    def _with(self, values: Mapping[str, Any]) -> Strategy:
        return parse_strategy({**self.strategy.to_dict(), **values}) if values else self.strategy


@dataclass(frozen=True)
class Play:
    """What to play: the prompt of an item, a strategy, and the seed of all that is random."""

    item: Item
    strategy: Strategy
    seed: int


@dataclass
class Rollout:
    """A play and what came of it.

    Attributes:
        play: what was asked for.
        outcome: with its graph; None if it failed.
        error: why it failed.
    """

    play: Play
    outcome: Outcome | None = None
    error: str = ""


def assign(items: Sequence[Item], group: int, arms: Sequence[Arm], seed: int, first: int = 0) -> list[Play]:
    """The plays of some prompts: `group` in a row for each, all by the same strategy.

    Prompts go to arms by their shares, in order; what is drawn is a function of (seed, index of the prompt).

    Args:
        items: the prompts.
        group: rollouts of each.
        arms: at least one.
        seed: of this generation.
        first: index of the first prompt (of several processes).
    """
    total, plays = sum(arm.share for arm in arms), []
    for index, item in enumerate(items):
        place, chosen = (index + 0.5) / len(items) * total, 0
        while place > arms[chosen].share and chosen < len(arms) - 1:
            place -= arms[chosen].share
            chosen += 1
        strategy = arms[chosen].strategy_for(random.Random(f"{seed}/{first + index}"))
        plays += [Play(item, strategy, sample_seed(seed, f"{first + index}/{item.id}", k)) for k in range(group)]
    return plays


class Player:
    """Plays rollouts on an engine; to be closed. All methods block.

    Args:
        engine: a URL, or an engine, which is left open.
        engines: further ones by alias.
        extract: the answer in a response.
        temperature: of all that strategies sample and do not set themselves.
        max_tokens: most tokens of a generation.
        budget: of a rollout, as a spec.
        concurrency: rollouts at a time.
        tries: how often a rollout is played before it is reported as failed, while the engine goes on working.
        patience: seconds for which an engine may be gone before the training ends with an error.
    """

    def __init__(
        self,
        engine: str | Engine,
        engines: Mapping[str, str | Engine] | None = None,
        *,
        extract: Extractor = extract_answer,
        temperature: float = 1.0,
        max_tokens: int | None = None,
        budget: str | None = None,
        concurrency: int = 256,
        tries: int = 3,
        patience: float = 600.0,
    ) -> None:
        self._url, self._engines = engine, engines
        self._settings: dict[str, Any] = {
            "extract": extract,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "budget": parse_budget(budget) if budget else None,
            # Of what was drawn: at temperature 1 these are the model's own log-probabilities.
            **({"logprobs": True} if temperature == 1 else {"logprobs": True, "tempered": True}),
        }
        self._concurrency, self._tries, self._patience = concurrency, tries, patience
        self._connection: Connection | None = None
        self._weights: Mapping[str, Any] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="orchestra-rollouts", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Open the engine, so that what is wrong with it is an error now."""
        self._wait(self._connected())

    def update(self, weights: Mapping[str, Any]) -> float:
        """Have the engine run by these weights, also after it was lost; returns the seconds that it took.

        They are not copied: until the next update they must be what they are now whenever rollouts are played.
        """
        began = time.monotonic()
        self._weights = weights
        self._wait(self._with_patience(self._update))
        return time.monotonic() - began

    def play(self, plays: Sequence[Play]) -> list[Rollout]:
        """Play all of them, in the order given. A rollout that failed again and again says so in its `error`.

        Raises:
            EngineError: the engine is gone for good.
            UsageError: none could be played: what is asked for cannot be.
        """
        return self._wait(self._play(list(plays)))

    def close(self) -> None:
        """Close the connection and end the thread; idempotent."""
        if self._thread.is_alive():
            self._wait(self._disconnect())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Have it done on the loop. Interrupted, it is cancelled, and so is what runs on the engine."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # -- on the loop -------------------------------------------------------------------------------------------------

    async def _connected(self) -> Connection:
        if self._connection is None:
            connection = connect(self._url, self._engines)
            await connection.__aenter__()
            self._connection = connection
        return self._connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(EngineError, OSError):
                await connection.close()

    async def _update(self) -> None:
        connection = await self._connected()
        if self._weights is not None:
            await connection.engine.update_weights(self._weights)

    async def _with_patience(self, work: Any) -> None:
        """Do it until it works; between two tries the engine is opened anew."""
        began, wait = time.monotonic(), _FIRST_WAIT
        while True:
            try:
                await work()
            except EngineError as error:
                await self._disconnect()
                if time.monotonic() - began + wait > self._patience:
                    raise EngineDown(
                        f"the rollout engine did not come back in {self._patience:g} s: {error}"
                    ) from error
                await asyncio.sleep(wait)
                wait = min(2 * wait, _LONGEST_WAIT)
            else:
                return

    async def _play(self, plays: list[Play]) -> list[Rollout]:
        done: dict[int, Rollout] = {}
        failed: Counter[int] = Counter()
        lost = 0
        while True:
            connection, before = await self._connected(), len(done)
            try:
                await self._round(connection, plays, done, failed)
                if len(done) == before < len(plays):
                    raise EngineDown("no rollout could be played")
                if not await connection.engine.weights_kept():
                    raise EngineDown("the engine began anew while rollouts were played")
            except EngineDown:
                lost += 1
                if lost > self._tries:
                    raise
                if not await self._kept(connection):
                    done.clear()  # some of it may be by other weights
                await self._disconnect()
                await self._with_patience(self._update)
                continue
            if len(done) == len(plays):
                break
        if plays and all(rollout.outcome is None for rollout in done.values()):
            raise UsageError(f"no rollout could be played: {done[0].error}")
        return [done[index] for index in range(len(plays))]

    @staticmethod
    async def _kept(connection: Connection) -> bool:
        try:
            return await connection.engine.weights_kept()
        except EngineError:
            return False

    async def _round(
        self, connection: Connection, plays: list[Play], done: dict[int, Rollout], failed: Counter[int]
    ) -> None:
        """Play what is not done yet, each once; the first `EngineDown` ends it."""
        waiting = iter([index for index in range(len(plays)) if index not in done])

        async def work() -> None:
            for index in waiting:
                play = plays[index]
                try:
                    outcome = await connection.run(
                        play.strategy, play.item.prompt, seed=play.seed, item=play.item.id, **self._settings
                    )
                except EngineDown:
                    raise
                except EngineError as error:
                    failed[index] += 1
                    if failed[index] >= self._tries:
                        done[index] = Rollout(play, error=" ".join(str(error).split()))
                except UsageError as error:  # such as a context that is full: it would fail again
                    done[index] = Rollout(play, error=" ".join(str(error).split()))
                else:
                    done[index] = Rollout(play, outcome)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(plays))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors
