"""Map and reduce by prompting: a plan, its parts side by side, a synthesis; for models never trained for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from orchestra.outcome import Candidate
from orchestra.strategies.prompts import followed_by
from orchestra.strategies.workspace import solution
from orchestra.thread import Thread

_ITEM = re.compile(r"[ \t]{0,16}[*_]{0,2}\d{1,3}[.):][*_]{0,2}[ \t]+(\S.*)")
_PART_CHARS = 500
_MAX_LINES = 10_000


async def prompted(thread: Thread, *, parts: int, expand_tokens: int | None = None) -> Thread:
    """Ask for a plan of independent parts, have each worked out by a call of its own, then for the answer.

    A plan of fewer than two parts has nothing to do side by side: the question is answered directly. The worked-out
    parts, one after the other, are offered as what a budget that ends early leaves.

    Args:
        thread: where the question stands.
        parts: most parts of the plan; what it has beyond them is left out.
        expand_tokens: most tokens of each part's call; None: the run's limit.

    Returns:
        The thread of the last call, whose text is the answer.
    """
    opened = await thread.opened()
    ask = (
        "Do not answer this yet. Split the work into parts that can be done independently of one another, at most "
        f"{parts}. Reply with a numbered list, one short line for each part, and nothing else."
    )
    planned = await thread.spawn([followed_by(thread.prompt, ask)])[0].generate()
    plan = parse_plan(solution(planned.text, opened), parts)
    if len(plan) < 2:
        return await thread.generate()
    listed = "\n".join(f"{number}. {part}" for number, part in enumerate(plan, 1))
    shared = f"The work on this is split into parts:\n\n{listed}\n\n"
    asks = [
        f"{shared}Do part {number} only, completely but briefly; others do the rest: {part}"
        for number, part in enumerate(plan, 1)
    ]
    workers = thread.spawn([followed_by(thread.prompt, ask) for ask in asks])
    results = [solution(worker.text, opened) for worker in await workers.generate(max_tokens=expand_tokens)]
    if not any(results):
        return await thread.generate()
    thread.offer(_so_far(thread, results))
    worked = "\n\n".join(
        f"Part {number}: {part}\n{result or '(no result)'}"
        for number, (part, result) in enumerate(zip(plan, results, strict=True), 1)
    )
    end = (
        f"The work on this was split into parts, done independently of one another:\n\n{worked}\n\nCheck them, put "
        "them together, and write the complete answer."
    )
    return await thread.spawn([followed_by(thread.prompt, end)])[0].generate()


def parse_plan(text: str, most: int) -> list[str]:
    """The items of a numbered list, without repetitions, at most `most` of them; other lines do not count."""
    plan: dict[str, str] = {}
    for line in text.splitlines()[:_MAX_LINES]:
        if (found := _ITEM.match(line[: 2 * _PART_CHARS])) is None:
            continue
        part = " ".join(found[1].split())[:_PART_CHARS]
        plan.setdefault(part.casefold(), part)
        if len(plan) == most:
            break
    return list(plan.values())


def _so_far(thread: Thread, results: Sequence[str]) -> Candidate:
    """The parts one after the other, as Skeleton-of-Thought gives them."""
    text = "\n\n".join(filter(None, results))
    return Candidate(text=text, answer=thread._run.extract(text), weight=0.0)
