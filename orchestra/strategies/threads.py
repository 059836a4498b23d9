"""ThreadWeaver: the model outlines threads, they run side by side, their tokens come back into one context."""

from __future__ import annotations

from pydantic import Field

from orchestra.protocols import THREAD_WEAVER
from orchestra.runtime.engine import Capability
from orchestra.strategies.fork_join import ForkJoin
from orchestra.strategies.one_thread import OneThread
from orchestra.thread import Thread


class ThreadWeaver(OneThread):
    """The model outlines threads, whose tokens come back into one context (ThreadWeaver).

    It writes numbered outlines and stops; a thread runs for each, seeing the text so far and nothing of its
    siblings; then all threads stand one after the other in one causal context (recompute join), and the model goes
    on. It needs nothing of a server but continuation. Critical path: the parent's tokens plus the longest thread of
    each block.

    Needs a model that was taught the language (`orchestra.protocols.THREAD_WEAVER`).

    Attributes:
        threads: most threads of a block; of more outlines the first ones are run.
        thread_tokens: most tokens that a thread may sample.
        opening: forced after the prompt, before the model speaks; None: what the model's folder says, if anything
            (docs/data.md).
        stops: how often the parent is stopped at a plan; then it is written to its end.
    """

    name = "threads"
    needs = frozenset({Capability.CONTINUE})
    paper = "Lian et al. 2025, arXiv 2512.07843"

    threads: int = Field(50, ge=1, le=1024)
    thread_tokens: int | None = Field(None, ge=1)
    opening: str | None = None
    stops: int = Field(32, ge=1, le=1024)

    async def __call__(self, thread: Thread) -> Thread:
        """The model's text, with its threads run."""
        rules = ForkJoin(THREAD_WEAVER, "recompute", self.threads, self.thread_tokens, self.stops)
        return await rules.run(thread, self.opening)
