"""Exact checking of Countdown answers, and finding the answer in a text.

The semantics are those that APR (arXiv:2504.15466) published: all numbers used exactly once, every step yields a
non-negative integer, division is exact, the arithmetic is right and the last result is the target. Nothing is ever
evaluated as code, and time and depth are bounded whatever the text holds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

LONGEST_ANSWER = 2000
"""Longer answers are wrong: no right one needs so many characters for the numbers that occur."""
DEEPEST = 50
"""Deepest nesting of brackets."""
LARGEST_VALUE = 10**12
"""No intermediate value may pass this."""

_STEP = re.compile(r"([0-9]{1,12}) ?([-+*/]) ?([0-9]{1,12}) ?= ?([0-9]{1,12})")
_TOKEN = re.compile(r"[0-9]{1,12}|[-+*/()]")
_TAG = re.compile(r"answer:", re.IGNORECASE)
_FRILLS = " \t\r*`$.,;"
_BOX = "\\boxed{"
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_LATEX = (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("\\left", ""), ("\\right", ""), ("\\,", " "), ("$", ""))


def check(numbers: Sequence[int], target: int, answer: str) -> bool:
    """Whether `answer` makes `target` out of all `numbers`.

    Args:
        numbers: The numbers of the problem, repeats included.
        target: What to reach.
        answer: Steps such as ``"8 - 3 = 5 , 5 * 12 = 60 , 60 - 7 = 53"`` (commas, semicolons or newlines between
            them), or one infix expression such as ``"(8-3)*12-7"``, with or without ``"= 53"`` after it.
    """
    if len(answer) > LONGEST_ANSWER:
        return False
    text = _plain(answer)
    parts = [part for part in re.split(r"[,;\n]", text) if part.strip()]
    steps = [_STEP.fullmatch(" ".join(part.split())) for part in parts]
    if parts and all(steps):
        groups = [match.groups() for match in steps if match is not None]
        if _check_steps(numbers, target, groups):
            return True
    # A single step is an expression as well, so an answer that fails as a list may still be right as an expression.
    return _check_expression(numbers, target, text)


def extract_answer(text: str) -> str | None:
    r"""The answer that a text ends in: what follows its last ``answer:`` or ``\boxed{``, whichever is later.

    After a tag the answer is the rest of its line (or the next one) and the lines after it that are steps; prose that
    follows is left out.

    Returns:
        The answer without surrounding space, or None when the text has none or says ``none``.
    """
    tag = max(_TAG.finditer(text), key=re.Match.start, default=None)
    boxed = text.rfind(_BOX)
    if boxed >= 0 and (tag is None or boxed > tag.start()):
        found = _braced(text, boxed + len(_BOX)) or ""
    elif tag is not None:
        lines = [line.strip(_FRILLS) for line in text[tag.end() :].split("\n")]
        lines = [line for line in lines if line]
        taken = lines[:1]
        for line in lines[1:LONGEST_ANSWER]:
            if _STEP.fullmatch(" ".join(line.split()).rstrip(" ,;")) is None:
                break
            taken.append(line)
        found = "\n".join(taken)
    else:
        return None
    found = found.strip(_FRILLS)
    return None if found.lower() in ("", "none") else found


def _plain(text: str) -> str:
    for latex, sign in _LATEX:
        text = text.replace(latex, sign)
    return text.translate(_SIGNS)


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for index in range(start, min(len(text), start + LONGEST_ANSWER)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None


def _operate(operator: str, left: int, right: int) -> int | None:
    if operator == "+":
        value = left + right
    elif operator == "-":
        value = left - right
    elif operator == "*":
        value = left * right
    elif right == 0 or left % right:
        return None
    else:
        value = left // right
    return value if 0 <= value <= LARGEST_VALUE else None


def _check_steps(numbers: Sequence[int], target: int, steps: Sequence[tuple[str, ...]]) -> bool:
    at_hand = Counter(numbers)
    if len(steps) != len(numbers) - 1:
        return False
    for left, operator, right, result in steps:
        for operand in (int(left), int(right)):
            if not at_hand[operand]:
                return False
            at_hand[operand] -= 1
        if _operate(operator, int(left), int(right)) != int(result):
            return False
        at_hand[int(result)] += 1
    return +at_hand == Counter([target])


def _check_expression(numbers: Sequence[int], target: int, text: str) -> bool:
    expression, equals, stated = text.partition("=")
    if equals and stated.strip() != str(target):
        return False
    tokens = _TOKEN.findall(expression)
    # Whatever is neither a token nor space (letters, points, other signs) disqualifies.
    if sum(map(len, tokens)) != len("".join(expression.split())):
        return False
    parser = _Parser(tokens)
    try:
        value = parser.parse()
    except ValueError:
        return False
    return value == target and Counter(parser.used) == Counter(numbers)


class _Parser:
    """Recursive descent over ``+ - * /`` and brackets; raises ValueError on anything that breaks the rules."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tokens
        self.place = 0
        self.used: list[int] = []

    def parse(self) -> int:
        value = self._sum(0)
        if self.place != len(self.tokens):
            raise ValueError("trailing text")
        return value

    def _peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        self.place += 1
        return token

    def _sum(self, depth: int) -> int:
        value = self._product(depth)
        while self._peek() in ("+", "-"):
            value = self._apply(self._next(), value, self._product(depth))
        return value

    def _product(self, depth: int) -> int:
        value = self._atom(depth)
        while self._peek() in ("*", "/"):
            value = self._apply(self._next(), value, self._atom(depth))
        return value

    def _atom(self, depth: int) -> int:
        token = self._next()
        if token == "(" and depth < DEEPEST:
            value = self._sum(depth + 1)
            if self._next() != ")":
                raise ValueError("unclosed bracket")
            return value
        if token.isdigit():
            self.used.append(int(token))
            return int(token)
        raise ValueError(f"unexpected {token!r}")

    @staticmethod
    def _apply(operator: str, left: int, right: int) -> int:
        value = _operate(operator, left, right)
        if value is None:
            raise ValueError("negative, inexact or huge")
        return value
