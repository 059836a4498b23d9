"""Optional parts: say which extra brings what is missing, before an import fails somewhere inside."""

from __future__ import annotations

from importlib.util import find_spec

from orchestra.errors import MissingExtraError


def require(*modules: str, what: str, extra: str) -> None:
    """Check that `modules` can be imported, without importing them.

    Raises:
        MissingExtraError: one cannot; names the extra to install.
    """
    if any(find_spec(module) is None for module in modules):
        raise MissingExtraError(what, extra)
