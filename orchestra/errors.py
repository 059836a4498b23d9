"""Every error that Orchestra raises on purpose: one hierarchy, one clear line each.

A message says what was wrong, where, and what would be right. The command line prints it on stderr
and exits with `exit_code`; anything that is not an `OrchestraError` is a defect.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class OrchestraError(Exception):
    """Base of all deliberate errors."""

    exit_code = 1


class UsageError(OrchestraError, ValueError):
    """The caller asked for something that cannot be: a bad value, name or combination."""

    exit_code = 2


class SpecError(UsageError):
    """A strategy or budget spec that does not parse, or names what does not exist."""


class PromptError(UsageError):
    """A prompt that this engine cannot take: empty, too long, or outside its vocabulary."""


class CapabilityError(UsageError):
    """A strategy needs what the engine cannot do."""


class MissingExtraError(UsageError):
    """An optional part is not installed; the message says which extra brings it."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs the '{extra}' extra: pip install 'orchestra-lm[{extra}]'")
        self.extra = extra


class EngineError(OrchestraError):
    """The engine failed while it worked: a lost connection, a crashed step, no memory."""


class EngineDown(EngineError):
    """The engine cannot be reached any more: whatever else is asked of it would fail the same way."""


class DegenerateWeights(OrchestraError):
    """No draw can be made by these weights: all of them are zero, or one is infinite or not a number."""


class BudgetExceeded(OrchestraError):
    """A budget ended. `limit` names which one; the scope whose ledger it was turns it into `stopped_by`."""

    def __init__(self, limit: str, allowed: float, ledger: object = None) -> None:
        super().__init__(f"budget spent: {limit} = {allowed:g}")
        self.limit = limit
        self.ledger = ledger


def one_of(kind: str, name: str, known: Iterable[str]) -> str:
    """The message for an unknown name: the nearest right ones first, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names) or 'none'})"
