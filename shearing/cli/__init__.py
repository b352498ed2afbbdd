"""The `shear` command: `app` is the frame, and each of the other files adds its commands to it."""

from __future__ import annotations

from shearing.cli import data, runs, sparse
from shearing.cli.app import app

__all__ = ["app", "data", "main", "runs", "sparse"]


def main() -> None:
    """Entry point of the console script."""
    app()
