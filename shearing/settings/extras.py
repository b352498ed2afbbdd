"""Packages that only some settings and commands need, and what to type where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from shearing.errors import ShearingError


def require_extra(extra: str, *, modules: Iterable[str], what: str) -> None:
    """Check that the packages of an extra are installed, without importing them.

    Args:
        extra: of pyproject.toml.
        modules: that it brings.
        what: needs them, for the message.

    Raises:
        ShearingError: one is missing.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise ShearingError(
                what,
                value=f"the package {module} is not installed",
                allowed=f"the packages of shearing[{extra}]",
                mend=f"pip install 'shearing[{extra}]'",
            )
