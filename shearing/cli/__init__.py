"""The `shear` command: `frame` is what all commands share, and each of the other files adds its own to it."""

from __future__ import annotations

from shearing.cli import compare, data, export, moe, runs, search, sparse  # noqa: F401 - they add their commands
from shearing.cli.frame import app

__all__ = ["app", "main"]


def main() -> None:
    """Entry point of the console script."""
    app()
