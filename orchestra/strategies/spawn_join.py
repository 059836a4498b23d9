"""Adaptive Parallel Reasoning: the model spawns children, each searches alone, their results return as messages."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from orchestra.protocols import apr, apr_published
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
        language: `apr`, short lines that the embedded model knows; `published`: the text of the paper's own models
            (`orchestra.protocols.apr_published`), in which the model alone says how many children.
        child_tokens: most tokens a child may sample.
    """

    needs = frozenset({Capability.CONTINUE})
    paper = "Pan et al. 2025, arXiv 2504.15466"

    children: int | None = Field(None, ge=1, le=apr.MAX_CHILDREN)
    rounds: int = Field(16, ge=1, le=256)
    language: Literal["apr", "published"] = "apr"
    child_tokens: int | None = Field(None, ge=1)

    async def __call__(self, thread: Thread) -> Thread:
        """Parent turns and child rounds, until the parent answers."""
        if self.language == "published":
            return await self._published(thread)
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

    async def _published(self, thread: Thread) -> Thread:
        """The same where the block that calls for children is taken out of the parent's context."""
        parent = thread
        for left in reversed(range(self.rounds + 1)):
            stops = (apr_published.CALLING, apr_published.JOINED)  # the second tag in the first one's place is meant so
            parent = await turn(parent, stop=stops if left else ())
            if parent.matched is None:
                break
            base = await parent.before_stop()
            asking = await base.append(apr_published.CALLING).generate(stop=apr_published.END_CALLING)
            told = f"{thread.prompt}{base.text}"
            if not (nodes := apr_published.asked(asking.generated, told)):
                parent = asking  # a block that asks for nothing is plain text
                continue
            prompts = [apr_published.child_prompt(node, told) for node in nodes]
            children = await asking.spawn(prompts).generate(max_tokens=self.child_tokens)
            parent = base.append(apr_published.render_join(nodes, [child.text for child in children]))
        return parent
