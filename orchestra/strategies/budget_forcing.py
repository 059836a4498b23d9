"""Budget forcing (s1): thinking is cut off, or made longer, by what is written into the thread."""

from __future__ import annotations

from pydantic import Field

from orchestra.runtime.engine import Capability
from orchestra.strategies.one_thread import OneThread, turn
from orchestra.thread import Thread


class BudgetForcing(OneThread):
    """One generation whose thinking is as long as it is told to be: it is ended after `thinking_tokens`, and where the
    model would end it itself it is told to wait, up to `extensions` times. Greedy unless a temperature is given.

    Attributes:
        thinking_tokens: most tokens of all thinking together; None: as many as the model likes.
        extensions: how often the end of thinking is taken back.
        wait: what is written in its place.
        end: the tag that ends thinking.
        cue: what is written after the tag where the limit has ended the thinking.
    """

    needs = frozenset({Capability.CONTINUE})
    paper = "Muennighoff et al. 2025, arXiv 2501.19393"

    thinking_tokens: int | None = Field(None, ge=1)
    extensions: int = Field(0, ge=0, le=256)
    wait: str = Field("Wait", min_length=1)
    end: str = Field("</think>", min_length=1)
    cue: str = "\n\nFinal Answer:"

    def requirements(self) -> frozenset[Capability]:
        """To take back a tag, the thread must leave its node before it."""
        return super().requirements() | (frozenset({Capability.CUT}) if self.extensions else frozenset())

    async def __call__(self, thread: Thread) -> Thread:
        """Think, again if told so, then answer."""
        left, extended = self.thinking_tokens, 0
        while True:
            thread = await turn(thread, stop=self.end, max_tokens=left)
            left = None if left is None else left - thread.sampled_tokens
            if thread.matched != self.end or extended == self.extensions or (left is not None and left < 1):
                break
            thread, extended = (await thread.before_stop()).append(self.wait), extended + 1
        if thread.matched == self.end:
            return await turn(thread)
        if thread.finish_reason == "stop" and not extended:
            return thread  # it does not think, and has answered
        return await turn(thread.append(f"\n{self.end}{self.cue}"))
