"""What the answer of a text is when no task says so, and which part of a text is thinking."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

Extractor = Callable[[str], str | None]

_MAX_CHARS = 200_000  # an answer stands near the end; this bounds the time on adversarial text
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"[{}]")
_ANSWER_LINE = re.compile(r"(?im)^[^\S\n]*(?:the |final )*answer(?: is)?[^\S\n]*[:=][^\S\n]*(\S[^\n]*)")


class Reasoning(NamedTuple):
    """A text split at its reasoning channel."""

    thinking: str
    solution: str
    closed: bool


def split_reasoning(text: str, start: str = "<think>", end: str = "</think>") -> Reasoning:
    """Split off the reasoning channel: all up to the last `end` tag.

    A text whose template already opened the channel has only the end tag. An opened and never closed channel has no
    solution.
    """
    head, tag, tail = text.rpartition(end)
    if tag:
        return Reasoning(head.replace(start, "", 1).strip(), tail.lstrip(), True)
    before, tag, thinking = text.partition(start)
    return Reasoning(thinking.strip(), before.rstrip(), False) if tag else Reasoning("", text, True)


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` (or `\fbox`), braces balanced; None if there is none."""
    for opening in reversed(list(_BOX.finditer(text))):
        depth = 1
        for brace in _BRACE.finditer(text, opening.end()):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[opening.end() : brace.start()].strip()
    return None


def extract_answer(text: str) -> str | None:
    r"""The default extractor: last `\boxed{}`, else the last `answer:` line, else the last number, else the last line.

    Thinking is not searched; an unclosed thinking block, an empty text and an answer of `none` have no answer.
    """
    reasoning = split_reasoning(text)
    if not reasoning.closed:
        return None
    solution = reasoning.solution.strip()[-_MAX_CHARS:]
    if not solution:
        return None
    answer = last_boxed(solution)
    if answer is None and (lines := _ANSWER_LINE.findall(solution)):
        answer = lines[-1].strip()
    if answer is None and (numbers := _NUMBER.findall(solution)):
        answer = numbers[-1].replace(",", "")
    if answer is None:
        answer = solution.splitlines()[-1].strip()
    return None if answer.lower() in ("", "none") else answer
