"""Weights that stay as they are."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.data.mixture.rules.rule import Seen, Vector, without_memory


@dataclass(frozen=True, kw_only=True)
class Constant:
    """w as it was."""

    def update(self, seen: Seen, *, memory: Vector) -> tuple[Vector, Vector]:  # noqa: ARG002 - remembers nothing
        """See `Rule.update`."""
        return without_memory(seen.weights, seen)

    def largest(self, prior: Vector) -> Vector:
        """See `Rule.largest`."""
        return prior
