"""Lock-step groups: generations that begin in one step, draw one token each in every step, and are seen between them.

Members are ordinary generations, in ordinary slots: in a step a slot draws one token whatever else there is, so all
that a group needs is that its members start together and that none gives way alone. What they read is the same as
without a group; so is what they draw.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from orchestra.runtime.engine import Look, Step

if TYPE_CHECKING:
    from orchestra.runtime.local.jobs import Job


class LockStep:
    """One group.

    Args:
        look: sees each step.

    Attributes:
        jobs: the members that have not ended, with their index.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self.jobs: dict[Job, int] = {}
        self._drawn: list[tuple[int, int, float, float, bool]] = []

    @property
    def members(self) -> int:
        """Those that have not ended."""
        return len(self.jobs)

    def leave(self, job: Job) -> None:
        """A member has ended."""
        self.jobs.pop(job, None)

    def note(self, job: Job, token: int, logprob: float, tempered: float | None) -> None:
        """A member has drawn a token; it has ended if its job is done."""
        law = math.nan if tempered is None else tempered
        self._drawn.append((self.jobs[job], token, logprob, law, job.done))

    def stopped(self) -> list[Job]:
        """Show the step that is complete; returns the members that are to stop here."""
        drawn, self._drawn = sorted(self._drawn), []
        if not drawn:  # no token was left for any of them
            return []
        members, tokens, logprobs, tempered, ended = (list(values) for values in zip(*drawn, strict=True))
        if not self._look(Step(members, tokens, logprobs, tempered, ended)):
            return []
        return [job for job in self.jobs if not job.done]
