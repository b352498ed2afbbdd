"""Reconstructions: what the kept weights do about those that go. One file each, one interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from shearing.errors import ShearingError
from shearing.sparsity.choice import Choice
from shearing.sparsity.criteria import Criterion
from shearing.sparsity.patterns import Pattern
from shearing.sparsity.statistics import Need


class Reconstruction(Protocol):
    """Prunes a matrix, asking a `Choice` for the mask when it is time."""

    @property
    def name(self) -> str:
        """As recipes say it."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """Statistics of the inputs that it works with."""
        ...

    @property
    def by_columns(self) -> bool:
        """Whether weights change column by column, so that a mask can be chosen on the way."""
        ...

    def prune(self, weight: Tensor, *, choice: Choice) -> tuple[Tensor, Tensor]:
        """Prune one matrix.

        Args:
            weight: [O, I], any dtype; not changed.
            choice: decides the mask.

        Returns:
            The pruned weight [O, I] fp32, zero where the mask is false; the mask [O, I] bool, true where kept.
        """
        ...


def reconstructions() -> Mapping[str, Reconstruction]:
    """Every reconstruction by name."""
    from shearing.sparsity.reconstruction.none import NoReconstruction
    from shearing.sparsity.reconstruction.obs import OptimalBrainSurgeon

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
