"""Reconstructions: what the kept weights do about those that go. One file each, one interface."""

from __future__ import annotations

from collections.abc import Mapping

from shearing.errors import ShearingError
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.patterns import Pattern
from shearing.pruning.sparse.reconstruction.none import NoReconstruction
from shearing.pruning.sparse.reconstruction.obs import OptimalBrainSurgeon
from shearing.pruning.sparse.reconstruction.reconstruction import Choice, Reconstruction

__all__ = ["Choice", "Reconstruction", "reconstructions", "require_valid"]


def reconstructions() -> Mapping[str, Reconstruction]:
    """Every reconstruction by name."""
    return {way.name: way for way in (NoReconstruction(), OptimalBrainSurgeon())}


def require_valid(criterion: Criterion, *, reconstruction: Reconstruction, pattern: Pattern) -> None:
    """Raises `ShearingError` where the three cannot work together."""
    if criterion.follows_compensation and reconstruction.by_columns and pattern.whole_rows:
        raise ShearingError(
            "group",
            value="cumulative",
            allowed=f"row or layer, with {criterion.name} and {reconstruction.name}: there the mask is chosen left "
            "to right while columns are compensated, and the cumulative rule has to see whole rows first",
            mend="set group: row, or reconstruction: none, or criterion: wanda",
        )
