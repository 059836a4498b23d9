"""Adaptive Parallel Reasoning: the model spawns children, each searches alone, their results return as messages."""

from __future__ import annotations

from pydantic import Field

from orchestra.protocols import apr
from orchestra.runtime.engine import Capability
from orchestra.strategies.one_thread import OneThread, turn
from orchestra.thread import Thread


class SpawnJoin(OneThread):
    """The model spawns children that search alone and report (APR).

    The parent writes a list of children and stops; all children run side by side, each with its own line and the
    target and nothing else; their results are written into the parent (recompute join), which goes on: to an answer,
    or to another round. The critical path is the parent's tokens plus the longest child of each round.

    Needs a model that was taught the spawn/join language (`orchestra.protocols.apr`), as the embedded one was.

    Attributes:
        children: children per round that the model is asked for; None: it decides. More children, shorter rounds.
        rounds: how often the parent is stopped at a join; then it is written to its end.
        child_tokens: most tokens a child may sample.
    """

    needs = frozenset({Capability.CONTINUE})
    paper = "Pan et al. 2025, arXiv 2504.15466"

    children: int | None = Field(None, ge=1, le=apr.MAX_CHILDREN)
    rounds: int = Field(16, ge=1, le=256)
    child_tokens: int | None = Field(None, ge=1)

    async def __call__(self, thread: Thread) -> Thread:
        """Parent turns and child rounds, until the parent answers."""
        parent = thread.append(apr.header(self.children))
        for left in reversed(range(self.rounds + 1)):
            parent = await turn(parent, stop=apr.STOP if left else ())
            if parent.matched is None:
                break
            if not (spawned := apr.parse_spawn(parent.generated)):
                continue  # a join that joins nothing is plain text
            prompts = [apr.child_prompt(line, str(thread.prompt)) for line in spawned]
            children = await parent.spawn(prompts).generate(max_tokens=self.child_tokens)
            parent = parent.append(apr.render_join(apr.child_result(child.text) for child in children))
        return parent
