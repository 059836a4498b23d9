"""What one round of a strategy leaves to the next: solutions without their thinking, within so many tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from orchestra.answers import split_reasoning
from orchestra.outcome import Candidate
from orchestra.runtime.engine import Prompt
from orchestra.strategies.prompts import followed_by
from orchestra.strategies.voting import majority, same_answer
from orchestra.thread import Thread

_CUT = "…"


class Draft(NamedTuple):
    """A solution that may be shown to others, and the answer in it."""

    solution: str
    answer: str | None


def solution(text: str, opened: bool) -> str:
    """The part of a response after its thinking; nothing if the thinking never ended.

    Args:
        text: the response.
        opened: whether the prompt had opened the reasoning channel; see `Thread.opened`.
    """
    if opened and "</think>" not in text:
        return ""
    return split_reasoning(text).solution.strip()


def usable(candidates: Sequence[Candidate], opened: bool) -> list[Draft]:
    """The drafts that have a solution, in order."""
    drafts = [Draft(solution(candidate.text, opened), candidate.answer) for candidate in candidates]
    return [draft for draft in drafts if draft.solution]


def by_support(drafts: Sequence[Draft]) -> list[int]:
    """Indices of the drafts, those with the most frequent answers first, then in order; without an answer last."""
    votes = Counter(same_answer(draft.answer) for draft in drafts if draft.answer is not None)
    return sorted(range(len(drafts)), key=lambda i: -votes[same_answer(drafts[i].answer)])


def latest(candidates: Sequence[Candidate]) -> int:
    """Index of the majority's choice in the last round (the highest weight) that has an answer at all."""
    answered = [candidate.weight for candidate in candidates if candidate.answer is not None]
    last = max(answered or [candidate.weight for candidate in candidates])
    indices = [i for i, candidate in enumerate(candidates) if candidate.weight == last]
    return indices[majority([candidates[i] for i in indices])]


def numbered(texts: Sequence[str]) -> str:
    """Attempts one after the other, numbered from 1."""
    return "\n\n".join(f"Attempt {number}:\n{text}" for number, text in enumerate(texts, 1))


async def fit(
    thread: Thread,
    texts: Sequence[str],
    limit: int,
    keep: Literal["head", "tail"],
    render: Callable[[Sequence[str]], str] = numbered,
) -> str:
    """`texts` rendered into at most `limit` tokens of the thread's engine; the longest are cut, all to one length.

    What comes out has been measured as it is, so the limit holds whatever the tokenizer does. Nothing fits: empty.

    Args:
        thread: whose engine counts.
        texts: what to show.
        limit: most tokens of all together.
        keep: which end of a cut text is kept.
        render: writes them as one text.
    """
    best = render(texts)
    if await thread.count(best) <= limit:
        return best

    def cut(text: str, most: int) -> str:
        if len(text) <= most:
            return text
        return text[:most] + _CUT if keep == "head" else _CUT + text[-most:]

    best, low, high = "", 0, max(map(len, texts)) - 1
    while low < high:
        most = (low + high + 1) // 2
        rendered = render([cut(text, most) for text in texts])
        if await thread.count(rendered) <= limit:
            best, low = rendered, most
        else:
            high = most - 1
    return best


async def shown(thread: Thread, drafts: Sequence[Draft], limit: int) -> Prompt | None:
    """A thread's prompt with a workspace of drafts; None if not even one of them fits into `limit` tokens.

    A model whose folder says how (`drafts` in `Engine.openings`, with `{answers}` in it) is shown their answers alone.
    """
    if template := await thread.opening("drafts"):
        workspace = await fit(thread, [draft.answer or "none" for draft in drafts], limit, "tail", listed)
        return followed_by(thread.prompt, template.replace("{answers}", workspace)) if workspace else None
    workspace = await fit(thread, [draft.solution for draft in drafts], limit, "tail")
    return informed(thread.prompt, workspace) if workspace else None


def listed(answers: Sequence[str]) -> str:
    """Answers, one a line, numbered from 1."""
    return "\n".join(f"{number}: {' '.join(answer.split())}" for number, answer in enumerate(answers, 1))


def informed(prompt: Prompt, workspace: str) -> Prompt:
    """The prompt of a round that has a workspace."""
    return followed_by(
        prompt,
        "These notes come from earlier attempts at this. Parts of them may be wrong, even where they agree: check what "
        f"you use.\n\n{workspace}\n\nNow give a complete solution of your own, with the final answer at its end.",
    )
