"""Multiverse and its relatives: the model maps a problem onto paths, they run side by side, it reduces them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestra.outcome import Outcome
from orchestra.protocols import BLOCKS
from orchestra.runtime.engine import Capability
from orchestra.strategies.fork_join import ForkJoin
from orchestra.strategies.one_thread import OneThread
from orchestra.strategies.prompted_map_reduce import prompted
from orchestra.thread import Join, Thread

MOST_PATHS = 64
"""Of a block: nobody has reported more, and a model that has lost its way may ask for thousands."""
PATHS = 8
"""Where neither model nor user says."""


class MapReduce(OneThread):
    """The model plans parallel paths and concludes from all of them (Multiverse).

    It writes a plan with outlines and stops; a path is forked for each, whose header is forced; all run side
    by side, blocks nested in them too; then the model concludes, seeing every path in full. On engines that can join
    by reuse nothing is computed again (Multiverse's lossless reduce). Critical path: the thread's own tokens plus the
    longest path of each block.

    Needs a model that was taught the language, or `plan=prompted`.

    Attributes:
        plan: `model`: the model was taught the language; `prompted`: any model is asked for parts, then for each, then
            for the answer (`language`, `join` and `stops` do not matter then).
        language: `multiverse`; `multiverse_engine`: with the line breaks of the published engine; `npr`;
            `parallel_r1`; `para_thinker`: whole thoughts from the prompt, then a summary.
        join: `reuse`, `recompute`, or `auto`: as the language was published, reuse where the engine can.
        paths: most paths of a block (64), or parts of a prompted plan (8); how many there are where the model does not
            say (`parallel_r1`, `para_thinker`: 8).
        path_tokens: most tokens that a path may sample between two stops.
        opening: forced after the prompt, before the model speaks; None: what the model's folder says, if anything
            (docs/data.md).
        stops: how often a thread is stopped at a tag; then it is written to its end.
    """

    paper = "Yang et al. 2025, arXiv 2506.09991; prompted: Ning et al. 2023, arXiv 2307.15337"

    plan: Literal["model", "prompted"] = "model"
    language: Literal["multiverse", "multiverse_engine", "npr", "parallel_r1", "para_thinker"] = "multiverse"
    join: Join = "auto"
    paths: int | None = Field(None, ge=1, le=1024)
    path_tokens: int | None = Field(None, ge=1)
    opening: str | None = None
    stops: int = Field(32, ge=1, le=1024)

    def requirements(self) -> frozenset[Capability]:
        """Continuation, and reuse joins if they are asked for; nothing of the prompted form."""
        if self.plan == "prompted":
            return super().requirements()
        reuse = {Capability.REUSE_JOIN} if self.join == "reuse" else set()
        return super().requirements() | {Capability.CONTINUE} | reuse

    async def __call__(self, thread: Thread) -> Thread | Outcome:
        """The model's text, with its blocks run; prompted, the answer of the last call."""
        if self.plan == "prompted":
            return await prompted(thread, parts=self.paths or PATHS, expand_tokens=self.path_tokens)
        language = BLOCKS[self.language]
        how: Join = "recompute" if self.join == "auto" and language.recompute else self.join
        paths = self.paths or (MOST_PATHS if language.plan else PATHS)
        return await ForkJoin(language, how, paths, self.path_tokens, self.stops).run(thread, self.opening)
