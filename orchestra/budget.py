"""Budgets: limits that nest, are shared by all threads of a scope, and count what is in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from orchestra.errors import BudgetExceeded


class Budget(BaseModel):
    """What a run, or a strategy inside it, may use. None is no limit.

    Attributes:
        sampled_tokens: all sampled tokens of all its threads.
        critical_path_tokens: sampled tokens along any one dependent chain.
        wall_seconds: time.
        requests: generations.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sampled_tokens: int | None = Field(None, ge=1)
    critical_path_tokens: int | None = Field(None, ge=1)
    wall_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    requests: int | None = Field(None, ge=1)


class Ledger:
    """One budget in use. Generations reserve what they may sample and give back what they did not.

    A generation that finds less than it may use waits for others to give some back; it gets less, or fails, only when
    none are in flight any more. So a budget is used to its end and never passed. The price: generations without
    `max_tokens` run one after the other under a `sampled_tokens` budget.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._requests = 0
        self._left = budget.sampled_tokens
        self._in_flight = 0
        self._changed = asyncio.Event()

    @property
    def counts(self) -> bool:
        """Whether it limits anything but time: then every generation must ask it."""
        budget = self.budget
        return (budget.sampled_tokens, budget.critical_path_tokens, budget.requests) != (None, None, None)

    async def take(self, wanted: int | None, *, wait: bool = True, members: int = 1) -> int | None:
        """Reserve up to `wanted` sampled tokens (None: as many as there are) for each of some requests.

        Args:
            wanted: how many.
            wait: for others to give some back. Members of a gang must not: the others wait for them.
            members: requests that go on together.

        Returns:
            The tokens granted to each, at least 1; None for no limit.

        Raises:
            BudgetExceeded: requests or sampled tokens are spent.
        """
        limit = self.budget.requests
        if limit is not None and self._requests + members > limit:
            raise BudgetExceeded("requests", limit, self)
        granted = wanted
        if self._left is not None:
            while wait and self._in_flight and (wanted is None or self._left < wanted * members):
                self._changed.clear()
                await self._changed.wait()
            share = self._left // members
            if not share:
                raise self.spent()
            granted = share if wanted is None else min(wanted, share)
            self._left -= granted * members
        self._in_flight += members
        self._requests += members
        return granted

    def give_back(self, granted: int | None, used: int, members: int = 1) -> None:
        """End a reservation: return what was granted and not used. Every `take` that returned is ended once.

        Args:
            granted: what `take` returned.
            used: by all members together.
            members: as for `take`.
        """
        self._in_flight -= members
        if self._left is not None and granted is not None:
            self._left += granted * members - used
        self._changed.set()

    def spent(self) -> BudgetExceeded:
        """The error of having no sampled tokens left."""
        return BudgetExceeded("sampled_tokens", self.budget.sampled_tokens or 0, self)


@dataclass
class Reservation:
    """Tokens reserved in every budget around it for one generation, or for each of some that go on together.

    Attributes:
        granted: most tokens it may sample; None for no limit.
        cut: the budget that granted less than was asked for, if one did.
        members: how many generations.
    """

    granted: int | None
    cut: BudgetExceeded | None = None
    members: int = 1
    _taken: list[tuple[Ledger, int | None]] = field(default_factory=list)

    @classmethod
    async def make(
        cls, levels: Sequence[tuple[Ledger, int]], wanted: int | None, *, wait: bool = True, members: int = 1
    ) -> Reservation:
        """Reserve in all `levels`, innermost first: pairs of a ledger and the critical path so far in its scope.

        `wait` and `members` as for `Ledger.take`.

        Raises:
            BudgetExceeded: one of them has nothing left.
        """
        reservation = cls(wanted, members=members)
        for ledger, depth in levels:
            limit = ledger.budget.critical_path_tokens
            if limit is not None:
                reservation._lower(limit - depth, BudgetExceeded("critical_path_tokens", limit, ledger))
        try:
            for ledger, _ in levels:
                amount = await ledger.take(reservation.granted, wait=wait, members=members)
                reservation._taken.append((ledger, amount))
                if amount is not None:
                    reservation._lower(amount, ledger.spent())
        except BaseException:
            reservation.end(0)
            raise
        return reservation

    def _lower(self, left: int, limit: BudgetExceeded) -> None:
        if left <= 0:
            raise limit
        if self.granted is None or left < self.granted:
            self.granted, self.cut = left, limit

    def end(self, used: int) -> None:
        """Give back in all levels what was not used by all members together."""
        while self._taken:
            ledger, amount = self._taken.pop()
            ledger.give_back(amount, used, self.members)
