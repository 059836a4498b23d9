"""What the scorers that ask a model have in common: how candidates are shown, and how replies are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from orchestra.runtime.engine import Prompt
from orchestra.spec import EngineAlias
from orchestra.strategies.prompts import alike
from orchestra.strategies.scorers.base import Scorer

if TYPE_CHECKING:
    from orchestra.thread import Thread

SCALE = range(1, 11)  # of DeepSeek-GRM's scores

_MAX_REPLY = 20_000  # verdicts stand at the end; this bounds the time on adversarial text
_LABEL = r"(?im)^[ \t>*#-]{0,8}"
_IS = r"[ \t*_:=]{1,10}"
_NUMBER = r"([-+]?[0-9]{1,9}(?:\.[0-9]{1,9})?)"
_SCORES = re.compile(rf"{_LABEL}response[ \t*_#]{{0,5}}([0-9]{{1,4}}){_IS}(?:score{_IS})?{_NUMBER}")
_RATING = re.compile(rf"{_LABEL}score{_IS}{_NUMBER}")
_BEST = re.compile(rf"{_LABEL}best{_IS}(?:response[ \t*_#]{{0,5}})?([0-9]{{1,4}})\b")


class AskingScorer(Scorer):
    """A scorer that asks a model about the candidates.

    Attributes:
        engine: alias of the engine to ask (`connect(..., engines={...})`); empty: the run's own.
        max_tokens: most tokens of one reply; None: the run's.
        max_chars: most characters of all solutions in one prompt, so that it fits into the model's context. The
            longest ones are cut in their middle: the way in and the result stay.
    """

    abstract = True

    engine: EngineAlias = ""
    max_tokens: int | None = Field(None, ge=1)
    max_chars: int = Field(60_000, ge=100)

    async def ask(
        self, thread: Thread, prompts: Sequence[str], each: Callable[[int, str], None], temperature: float = 0.0
    ) -> None:
        """Ask all side by side; `each` gets index and reply, without its thinking, as it comes."""
        calls = thread.spawn([alike(thread.prompt, prompt) for prompt in prompts], engine=self.engine)
        await calls.generate(
            each=lambda index, call: each(index, call.reasoning.solution),
            temperature=temperature,
            max_tokens=self.max_tokens,
        )


def shuffles(thread: Thread, times: int, count: int) -> list[list[int]]:
    """Random orders of 0..count-1: functions of the run's seed and the thread's place in it."""
    rng = thread.random("scorer")
    return [rng.sample(range(count), count) for _ in range(times)]


def task(prompt: Prompt) -> str:
    """What was asked, to be quoted: the text, or the whole conversation if there is more than one message."""
    if isinstance(prompt, str):
        return prompt.strip()
    if len(prompt) == 1:
        return prompt[0]["content"].strip()
    return "\n\n".join(f"{message['role']}: {message['content'].strip()}" for message in prompt)


def exhibits(prompt: Prompt, responses: Sequence[str], max_chars: int) -> str:
    """The question and numbered responses, as the first part of a prompt."""
    shown = (
        f"<response {number}>\n{text or '(nothing)'}\n</response {number}>"
        for number, text in enumerate(shortened(responses, max_chars), 1)
    )
    return "\n\n".join([f"<question>\n{task(prompt)}\n</question>", *shown])


def shortened(texts: Sequence[str], total: int) -> list[str]:
    """Texts of at most `total` characters together: those above a common limit lose their middle."""
    left, limit = total, total
    for rank, length in enumerate(sorted(map(len, texts))):
        limit = left // (len(texts) - rank)
        if length > limit:
            break
        left -= length
    else:
        return list(texts)
    return [t if len(t) <= limit else f"{t[: limit // 2]} [...] {t[len(t) - (limit - limit // 2) :]}" for t in texts]


def scores_in(reply: str, count: int) -> list[float] | None:
    """The scores of responses 1..count in a reply; the last line about a response is what counts.

    A response without a score gets the mean of the others: it is neither punished nor preferred for what the judge
    forgot. None if there is no score at all, or one that is no whole number from 1 to 10: a judge on another scale.
    """
    found = {int(label): float(score) for label, score in _SCORES.findall(reply[-_MAX_REPLY:])}
    found = {label: score for label, score in found.items() if 1 <= label <= count}
    if not found or any(score not in SCALE for score in found.values()):
        return None
    mean = sum(found.values()) / len(found)
    return [found.get(label, mean) for label in range(1, count + 1)]


def rating_in(reply: str) -> float | None:
    """The last `Score: N` of a reply; None without one, or if it is no whole number from 1 to 10."""
    scores = _RATING.findall(reply[-_MAX_REPLY:])
    return float(scores[-1]) if scores and float(scores[-1]) in SCALE else None


def best_in(reply: str, count: int) -> int | None:
    """The last `Best: Response N` of a reply; None without one, or if it is not from 1 to count."""
    picks = _BEST.findall(reply[-_MAX_REPLY:])
    return int(picks[-1]) if picks and 1 <= int(picks[-1]) <= count else None
