"""Hogwild! Inference: workers who think at the same time and see each other's tokens as they are written."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

from pydantic import Field

from orchestra.answers import last_boxed
from orchestra.errors import BudgetExceeded, PromptError
from orchestra.group import first_value
from orchestra.outcome import Candidate, Outcome
from orchestra.runtime.engine import Capability
from orchestra.shared_cache import Headers, Layout, SharedCache
from orchestra.strategies.base import Strategy
from orchestra.strategies.prompts import followed_by
from orchestra.thread import Thread

NAMES = ("Alice", "Bob", "Carol", "Dave", "Erin", "Frank", "Grace", "Heidi")

INSTRUCTIONS = """You are {count} workers who solve this together: {names}. You all think at the same time, in short \
steps, each a paragraph that begins with your name and a number, such as "{first} [1]:". While you write you see what \
the others have written so far, even their unfinished steps. Talk to each other: share out the work, build on what \
others have found, say when someone has made a mistake, and do not do what another is doing. Whoever knows the answer \
writes it as \\boxed{{...}}."""
"""What `instruct` adds to the prompt."""

STEP_ENDS = tuple(f"{mark}\n\n" for mark in (".", "!", "?", ":", ";", ")", "]", "}", "*", "`", "$"))
"""A step ends with an empty line after a mark; a line break inside a sentence or a list does not end it."""


class Hogwild(Strategy):
    r"""Workers write at the same time in one concurrent cache, where each reads the others' tokens at once (Hogwild!).

    Each step of a worker is a paragraph that begins with its name. All workers make their tokens in lock-step: token t
    of one sees token t of the others, in every layout that shows unfinished steps. It ends when a finished step holds a
    `\boxed{}` answer, or all have used their tokens; then `finish` asks for the answer, in view of everything.
    Critical path: the longest worker's own tokens.

    Needs a capable reasoning model (the paper's smallest that coordinate have 4 to 8 billion parameters), or one that
    was taught (`configs/dictation.yaml`).

    Attributes:
        workers: how many.
        layout: `combined`: finished steps of all, then what the others write, then one's own; `interleaved`: without
            what the others have not finished; `contiguous`: all of each other worker, then all of one's own.
        instruct: explain the setting in the prompt.
        step_tokens: most tokens of a step; one that is cut off there goes on in the next.
        steps: most steps of a worker; None for no limit.
        max_tokens: most tokens of a worker; None: up to the run's own `max_tokens`, else to the end of the context.
        names: of the workers.
        header: what a step begins with, of `{name}` and `{step}`.
        past, others, own: what stands before the parts of a worker's view.
        step_ends: strings that end a step, outside of code.
        check_every: after so many tokens of all workers the next step begins with `check`; 0 for never.
        check: a question to oneself about redundant work.
        ban_eos: nobody can end the text; else a worker that does leaves.
        ban: further texts of a single token that nobody can write: the end of thinking, say.
        finish: what asks for the answer when nobody has given one; empty for nothing.
        finish_tokens: most tokens of that answer.
    """

    needs = frozenset({Capability.CONTINUE, Capability.CONCURRENT_CACHE})
    paper = "Rodionov et al. 2025, arXiv 2504.06261"

    workers: int = Field(2, ge=1, le=8)
    layout: Layout = "combined"
    instruct: bool = True
    step_tokens: int = Field(512, ge=1)
    steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    names: list[str] = Field(default_factory=lambda: list(NAMES))
    header: str = Field("{name} [{step}]:", min_length=1)
    past: str = "### Finished steps\n\n"
    others: str = "### The others are writing\n\n"
    own: str = "### You are writing\n\n"
    step_ends: list[str] = Field(default_factory=lambda: list(STEP_ENDS))
    check_every: int = Field(1024, ge=0)
    check: str = " Quick check: is somebody else doing this already? (yes/no):"
    ban_eos: bool = True
    ban: list[str] = Field(default_factory=lambda: ["</think>"])
    finish: str = "\n\nOur answer: \\boxed{"
    finish_tokens: int = Field(64, ge=1)

    def requirements(self) -> frozenset[Capability]:
        """To ban tokens, if there are any."""
        return super().requirements() | ({Capability.LOGIT_BIAS} if self.ban_eos or self.ban else frozenset())

    async def __call__(self, thread: Thread) -> Outcome:
        """What all have written, and the answer."""
        if self.instruct:
            names = ", ".join(map(self.name_of, range(self.workers)))
            told = INSTRUCTIONS.format(count=self.workers, names=names, first=self.name_of(0))
            (thread,) = thread.spawn([followed_by(thread.prompt, told)])
        headers = Headers(self.past, self.others, self.own)
        async with thread.shared(self.workers, self.layout, headers) as cache:
            talk = _Talk(self, thread, cache, await self._banned(thread, cache))
            try:
                answer = await first_value([talk.work(worker) for worker in range(self.workers)])
                if answer is None and self.finish:
                    await talk.ask()
            except (BudgetExceeded, asyncio.CancelledError):  # a budget of seconds cancels
                thread.offer(talk.candidate())
                raise
        outcome = self.conclude([talk.candidate()])
        outcome._thread = thread.append(cache.text, ids=cache.ids)
        return outcome

    async def _banned(self, thread: Thread, cache: SharedCache) -> dict[int, float]:
        """The bias of what nobody can write, on top of the thread's own."""
        ids = set(thread.eos_ids) if self.ban_eos else set()
        for text in self.ban:
            with suppress(PromptError):  # no word of this model: it cannot write it
                found = await cache.encode(text)
                ids.update(found if len(found) == 1 else ())
        return dict(thread.sampling().logit_bias) | dict.fromkeys(ids, -math.inf)

    def name_of(self, worker: int) -> str:
        """The worker's name; a number if there are too few."""
        return self.names[worker] if worker < len(self.names) else str(worker + 1)


class _Talk:
    """What the workers of one run share besides the cache."""

    def __init__(self, strategy: Hogwild, thread: Thread, cache: SharedCache, bias: dict[int, float]) -> None:
        self._strategy, self._thread, self._cache, self._bias = strategy, thread, cache, bias
        self._unchecked = 0  # tokens of all workers since one was last asked for redundant work

    async def work(self, worker: int) -> str | None:
        """One worker's steps; returns the answer if it has found one."""
        strategy, cache = self._strategy, self._cache
        left = strategy.max_tokens or self._thread.sampling().max_tokens
        text, steps = "", 0  # of a step, which may take several generations
        try:
            while True:
                allowed = strategy.step_tokens if left is None else min(strategy.step_tokens, left)
                step = await cache.write(
                    worker,
                    "" if text else self._header(worker, steps),
                    max_tokens=allowed,
                    stop=strategy.step_ends,
                    logit_bias=self._bias,
                )
                self._unchecked += step.count
                text += step.generated
                left = None if left is None else left - step.count
                stuck = step.finish_reason == "length" and step.count < allowed  # the end of the context
                if step.matched is not None and not _in_code(text):
                    if (answer := last_boxed(text)) is not None:
                        return answer
                    text, steps = "", steps + 1
                if left == 0 or stuck or step.eos or steps == strategy.steps:
                    return last_boxed(text)
        finally:
            cache.leave(worker)

    def _header(self, worker: int, step: int) -> str:
        strategy = self._strategy
        text = strategy.header.replace("{name}", strategy.name_of(worker)).replace("{step}", str(step + 1))
        if strategy.check_every and self._unchecked >= strategy.check_every:
            self._unchecked = 0
            text += strategy.check
        return text

    async def ask(self) -> str:
        """Have somebody answer in view of everything; returns the text with the answer."""
        strategy = self._strategy
        step = await self._cache.write(
            strategy.workers, strategy.finish, max_tokens=strategy.finish_tokens, temperature=0.0, stop=("}", "\n")
        )
        return step.text

    def candidate(self) -> Candidate:
        """All that has been written, with the answer in the last of it that holds one."""
        text, steps = self._cache.text, self._cache.steps
        return Candidate(
            text=text,
            answer=self._thread.answer_in(text),
            # Who was cut off because another had the answer did not end the run.
            finish_reason=next((step.finish_reason for step in steps[::-1] if step.finish_reason != "cancelled"), None),
            tokens=sum(step.count for step in steps),
        )


def _in_code(text: str) -> bool:
    return text.count("```") % 2 == 1
