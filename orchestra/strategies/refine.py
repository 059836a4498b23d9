"""Sequential refinement: the model gets its own answer back and improves it."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Prompt
from orchestra.spec import EngineAlias
from orchestra.strategies.base import Strategy, StrategyField
from orchestra.strategies.prompts import followed_by
from orchestra.strategies.sample import Sample
from orchestra.strategies.voting import same_answer
from orchestra.strategies.workspace import latest, listed, solution
from orchestra.thread import Thread


class Refine(Strategy):
    """Sequential refinement: an answer, then rounds in which the model sees the question and its last answer (not the
    thinking) and writes a better one.

    Attributes:
        rounds: refinements after the first answer.
        critique: whether a call of its own looks for errors before each refinement, which sees what it found.
        patience: stop once the answer has not changed for so many rounds; None: never.
        drafts: what writes one answer.
        engine: alias of the engine that looks for errors; empty: the one that answers.
    """

    paper = "Madaan et al. 2025, arXiv 2510.01123 (its sequential baseline); Self-Refine: arXiv 2303.17651"

    rounds: int = Field(3, ge=1, le=256)
    critique: bool = False
    patience: int | None = Field(None, ge=1)
    drafts: StrategyField = Field(default_factory=Sample)
    engine: EngineAlias = ""

    async def __call__(self, thread: Thread) -> Outcome:
        """Answer, then refine; the last answer is the result."""
        opened = await thread.opened()
        drawn: list[Candidate] = []
        previous, unchanged = "", 0
        for number in range(self.rounds + 1):
            start = thread.spawn([await self._prompt(thread, previous, drawn[0].answer)])[0] if previous else thread
            candidate = (await start.run(self.drafts)).as_candidate(weight=number + 1.0)
            thread.offer(candidate)
            drawn.insert(0, candidate)
            answer = same_answer(candidate.answer)
            same = number > 0 and answer is not None and answer == same_answer(drawn[1].answer)
            unchanged = unchanged + 1 if same else 0
            if self.patience is not None and unchanged >= self.patience:
                break
            previous = solution(candidate.text, opened) or previous
        return self.conclude(drawn)

    async def _prompt(self, thread: Thread, previous: str, answer: str | None) -> Prompt:
        """What a refinement is asked; a model whose folder says how is shown the answer alone (`workspace.shown`)."""
        if not self.critique and (template := await thread.opening("drafts")):
            return followed_by(thread.prompt, template.replace("{answers}", listed([answer or "none"])))
        given = f"An earlier answer to this was:\n\n{previous}\n\n"
        if self.critique:
            ask = followed_by(
                thread.prompt, f"{given}Do not answer again now. Check that answer step by step and list its errors."
            )
            judge = thread.spawn([ask], self.engine or None)[0]
            said = await judge.generate()
            if errors := solution(said.text, await judge.opened()):
                given += f"A check of it found:\n\n{errors}\n\n"
        return followed_by(thread.prompt, f"{given}Correct and improve it: write the complete answer anew.")

    def choose(self, candidates: Sequence[Candidate]) -> int:
        """The last round's that has an answer."""
        return latest(candidates)
