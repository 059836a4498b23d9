"""How Parallel-Distill-Refine makes a workspace of a round's drafts."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from orchestra.runtime.engine import Prompt
from orchestra.strategies.prompts import followed_by
from orchestra.strategies.workspace import Draft, by_support, fit, numbered, solution
from orchestra.thread import Thread

_SELECTED = re.compile(r"selected:([\d, \t]{1,1000})", re.IGNORECASE)
_MAX_CHARS = 4000  # a selection stands at the end of what the model says
_WORDS_A_TOKEN = 0.6


async def global_summary(thread: Thread, drafts: Sequence[Draft], limit: int, engine: str) -> str:
    """One call over all drafts writes the workspace; empty if it writes nothing."""
    prompt = summary_prompt(thread.prompt, drafts, limit)
    judge = thread.spawn([prompt], engine or None)[0]
    said = await judge.generate()
    text = solution(said.text, await judge.opened())
    return await fit(thread, [text], limit, "head", "".join) if text else ""


async def best(thread: Thread, drafts: Sequence[Draft], k: int, engine: str) -> list[int]:
    """Indices of `k` drafts that one call selects, best first; on nonsense those whose answers have most support."""
    if k >= len(drafts):
        return list(range(len(drafts)))
    judge = thread.spawn([selection_prompt(thread.prompt, drafts, k)], engine or None)[0]
    said = await judge.generate()
    picked = parse_selection(solution(said.text, await judge.opened()), len(drafts), k)
    return picked or by_support(drafts)[:k]


def at_random(thread: Thread, drafts: Sequence[Draft], k: int) -> list[int]:
    """Indices of `k` drafts, drawn for this thread of this run."""
    return random.Random(f"{thread._run.seed}/{thread.path}").sample(range(len(drafts)), min(k, len(drafts)))


def parse_selection(text: str, count: int, k: int) -> list[int] | None:
    """Indices in the last `selected: 3, 1` of a text; None unless it names exactly `k` different ones of `count`."""
    found = _SELECTED.findall(text[-_MAX_CHARS:])
    known = {str(number): number - 1 for number in range(1, count + 1)}
    named = [number.strip() for number in found[-1].split(",")] if found else []
    if len(named) != k or len(set(named)) != k or not all(number in known for number in named):
        return None
    return [known[number] for number in named]


def summary_prompt(prompt: Prompt, drafts: Sequence[Draft], limit: int) -> Prompt:
    """Asks for a global summary."""
    return followed_by(
        prompt,
        f"Do not answer this now. Here are {len(drafts)} independent attempts at it; any of them may be wrong.\n\n"
        f"{numbered([draft.solution for draft in drafts])}\n\n"
        f"Write notes for whoever tries next, in at most {max(1, int(limit * _WORDS_A_TOKEN))} words, the most useful "
        "first: what the attempts agree on; where they contradict each other, and who is right; intermediate results "
        "that hold; subgoals still open; what to do next.",
    )


def selection_prompt(prompt: Prompt, drafts: Sequence[Draft], k: int) -> Prompt:
    """Asks for the `k` best drafts."""
    example = ", ".join(map(str, range(k, 0, -1)))
    return followed_by(
        prompt,
        f"Do not answer this now. Here are {len(drafts)} independent attempts at it; any of them may be wrong.\n\n"
        f"{numbered([draft.solution for draft in drafts])}\n\n"
        f"Which {k} of them would help most to answer it correctly? End with one line that names exactly {k}, the best "
        f"first, like this:\nselected: {example}",
    )
