"""What an allocation is: what it is made from, what it says, and what shares a level; and the check that it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal, Protocol

from rich.console import Console

from shearing.errors import ShearingError
from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.calibration.stored_walk import Compute
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.patterns import Pattern
from shearing.pruning.sparse.reconstruction.reconstruction import Reconstruction

UnitKind = Literal["block", "matrix"]


@dataclass(frozen=True)
class Unit:
    """Matrices that share one level.

    Attributes:
        name: the weight's, or "layer 3".
        layer: index of the decoder layer.
        matrices: members.
    """

    name: str
    layer: int
    matrices: tuple[Matrix, ...]

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(matrix.size for matrix in self.matrices)


@dataclass(frozen=True)
class Request:
    """What an allocation is made from.

    Attributes:
        source: the dense model; its weights are read when they are needed.
        matrices: what is pruned, layer by layer.
        calibration: None where nobody needs any.
        criterion, reconstruction: how the model will be pruned.
        damping: of the inputs' second moment; see `InverseFactor`.
        budget: share of the weights of `matrices` to keep, which levels can be mixed to.
        levels: patterns to choose from, each of a density of its own, sparsest first.
        unit: what has one level: a decoder layer, or each matrix.
        compute: where and how layers are computed; its `folder` keeps what an interrupted run continues from.
        console: for progress.
    """

    source: Source
    matrices: Sequence[Matrix]
    calibration: Calibration | None
    criterion: Criterion
    reconstruction: Reconstruction
    damping: float
    budget: Fraction
    levels: Sequence[Pattern]
    unit: UnitKind
    compute: Compute
    console: Console

    @property
    def units(self) -> list[Unit]:
        """What gets a level each, layer by layer."""
        return units_of(self.matrices, unit=self.unit)


@dataclass(frozen=True)
class Allocation:
    """The choice of an allocator.

    Attributes:
        patterns: by name of each matrix.
        facts: JSON-able: `scores` (what the choice rests on, a number by name of each unit) and what else people want
            to see.
    """

    patterns: Mapping[str, Pattern]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Allocator(Protocol):
    """Chooses a level for every matrix."""

    def allocate(self, request: Request) -> Allocation:
        """A pattern by name of each matrix, whose mean density, weighed by parameters, is the budget exactly.

        Raises:
            ShearingError: no choice of levels meets the budget.
        """
        ...


def units_of(matrices: Sequence[Matrix], *, unit: UnitKind) -> list[Unit]:
    """Matrices by what shares a level, in their order."""
    if unit == "matrix":
        return [Unit(matrix.name, matrix.layer, (matrix,)) for matrix in matrices]
    layers: dict[int, list[Matrix]] = {}
    for matrix in matrices:
        layers.setdefault(matrix.layer, []).append(matrix)
    return [Unit(f"layer {layer}", layer, tuple(members)) for layer, members in layers.items()]


def patterns_of(units: Sequence[Unit], *, choice: Sequence[int], levels: Sequence[Pattern]) -> dict[str, Pattern]:
    """Pattern by name of each matrix, of the index of a level for each unit."""
    return {matrix.name: levels[index] for unit, index in zip(units, choice, strict=True) for matrix in unit.matrices}


def mean_density(allocation: Mapping[str, Pattern], *, matrices: Sequence[Matrix]) -> Fraction:
    """Share of all weights that the patterns keep, exactly."""
    kept = sum((allocation[matrix.name].density * matrix.size for matrix in matrices), Fraction(0))
    return kept / sum(matrix.size for matrix in matrices)


def require_fit(allocation: Mapping[str, Pattern], *, matrices: Sequence[Matrix], budget: Fraction) -> None:
    """Check an allocation before anything expensive starts.

    Raises:
        ShearingError: it is of other matrices, a matrix cannot have its pattern, or the budget is missed.
    """
    names = {matrix.name for matrix in matrices}
    if unknown := sorted(names ^ allocation.keys()):
        raise ShearingError(
            "allocation",
            value=unknown[:3],
            allowed="one pattern for each matrix that is pruned, and for no other",
            mend="use the allocation with the model, include and exclude that it was made for",
        )
    for matrix in matrices:
        allocation[matrix.name].check(rows=matrix.rows, columns=matrix.columns, name=matrix.name)
    reached = mean_density(allocation, matrices=matrices)
    if reached != budget:
        raise ShearingError(
            "allocation",
            value=f"{float(reached):.6f} of the weights kept",
            allowed=f"{float(budget):.6f}",
            mend="choose levels that can be mixed to the budget",
        )
