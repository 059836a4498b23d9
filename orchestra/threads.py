"""Groups of threads: verbs that act on all members side by side."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from orchestra import lockstep, siblings
from orchestra.errors import UsageError
from orchestra.group import gather, race
from orchestra.outcome import Outcome
from orchestra.siblings import Each

if TYPE_CHECKING:
    from orchestra.runtime.engine import Look
    from orchestra.strategies.base import Spec
    from orchestra.thread import Thread

T = TypeVar("T")


class Threads(tuple["Thread", ...]):
    """A group of threads; its verbs act on all members side by side."""

    __slots__ = ()

    def append(self, text: str | Sequence[str]) -> Threads:
        """Append one text to all, or one to each."""
        texts = [text] * len(self) if isinstance(text, str) else text
        return Threads(thread.append(piece) for thread, piece in zip(self, texts, strict=True))

    async def generate(self, *, each: Each | None = None, **sampling: Any) -> Threads:
        """Generate on all; see `Thread.generate`.

        Args:
            each: called with index and thread of each that ends, as it ends.
            sampling: as for one thread.
        """
        if self and siblings.alike(self, settings := self[0].sampling(**sampling)):
            return Threads(await siblings.generate(self, settings, each))

        async def one(index: int, thread: Thread) -> Thread:
            grown = await thread.generate(**sampling)
            if each is not None:
                each(index, grown)
            return grown

        return Threads(await gather([one(index, thread) for index, thread in enumerate(self)]))

    async def generate_in_step(self, look: Look, **sampling: Any) -> Threads:
        """Generate on all in lock-step: each step draws one token for each member that has not ended.

        Args:
            look: sees each step; once it returns True all members stop there (`finish_reason` is then `paused`). It is
                called on the engine's thread, so it must be quick, and touch nothing but what belongs to it.
            sampling: as for one thread.

        Raises:
            GroupCut: a budget ended it; the threads as they are then are its `threads`.
            CapabilityError: the engine cannot.
            UsageError: there are more threads than the engine can take, or they are of several engines.
        """
        return Threads(await lockstep.generate(self, self[0].sampling(**sampling), look)) if self else self

    async def run(self, strategy: Spec) -> list[Outcome]:
        """Run a strategy on each."""
        return await gather([thread.run(strategy) for thread in self])

    async def map(self, work: Callable[[Thread], Coroutine[Any, Any, T]]) -> list[T]:
        """Run any coroutine function on each."""
        return await gather([work(thread) for thread in self])

    async def race(
        self,
        first: int = 1,
        by: Literal["time", "tokens"] = "tokens",
        work: Callable[[Thread], Coroutine[Any, Any, Any]] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """The first results, in the order of the finish; the others are cancelled, on the server too.

        Args:
            first: how many.
            by: the clock: `time`, or `tokens` sampled (independent of the schedule; ties to the lower fork index).
            work: what each runs; default: one generation, whose results are threads.
            sampling: settings of that generation.
        """
        members = [work(thread) if work else thread.generate(**sampling) for thread in self]
        run = self[0]._run if self else None
        if run is None:
            raise UsageError("a race needs at least one thread")
        return [result for _, result in await race(run, members, first, by)]

    async def score(self, text: str) -> list[list[float]]:
        """Score `text` on each; see `Thread.score`."""
        return await gather([thread.score(text) for thread in self])

    def resample(self, ancestors: Sequence[int]) -> Threads:
        """New threads from the members with these indices (an index may occur often); nothing is copied.

        They come after all members: who goes on may depend on all of them. What the engine keeps for members that do
        not may go; they can be gone on from all the same.
        """
        if any(not 0 <= a < len(self) for a in ancestors):
            raise UsageError(f"ancestors are indices 0..{len(self) - 1}, not {list(ancestors)}")
        lockstep.resampled(self, ancestors)
        return Threads(self[a].fork(1)[0] for a in ancestors)
