"""One generation: what every other strategy is compared with, and what most of them draw from."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from orchestra.strategies.base import Strategy
from orchestra.thread import Thread


class Sample(Strategy):
    """One generation, greedy unless a temperature is given.

    Attributes:
        temperature: 0 is greedy; None: the run's, else that of the strategy around it, else 0.
        top_p: nucleus of the distribution to sample from.
        max_tokens: most tokens to sample.
        stop: strings that end it.
    """

    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: list[str] = Field(default_factory=list)

    async def __call__(self, thread: Thread) -> Thread:
        """Generate once."""
        return await thread.generate(**self.settings())

    def settings(self) -> dict[str, Any]:
        """What it sets of `Sampling`; None where it sets nothing."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": self.stop or None,
        }
