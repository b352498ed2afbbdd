"""The estimators by name: what each does, and where it is defined. Imports no torch.

An estimator is one file with one class that does what `Estimator` says, and one line here; recipes take their names
from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from shearing.errors import ShearingError


@dataclass(frozen=True, kw_only=True)
class EstimatorFacts:
    """What is to be known of an estimator before it is imported.

    Attributes:
        home: `module:class`.
        summary: what it is, as the documentation of the recipe's key says it.
        source: where it comes from.
        budgets: whether it can meet a parameter budget, whose sizes are free.
    """

    home: str
    summary: str
    source: str
    budgets: bool


_HERE = "shearing.pruning.structured.estimators"

ESTIMATORS: dict[str, EstimatorFacts] = {
    "straight_through": EstimatorFacts(
        home=f"{_HERE}.straight_through:StraightThrough",
        summary="without noise, every row adds up to its target at every step; units around the cut are half there at "
        "first, and every unit but a closed expert has a gradient",
        source="arXiv 1308.3432",
        budgets=False,
    ),
    "hard_concrete": EstimatorFacts(
        home=f"{_HERE}.min_max:MinMax",
        summary="noisy masks whose expected sizes multipliers pull to the target (paper)",
        source="arXiv 2310.06694",
        budgets=True,
    ),
}


def no_budget(name: str) -> ShearingError:
    """What is wrong where this estimator is asked to meet a parameter budget."""
    able = [other for other, facts in ESTIMATORS.items() if facts.budgets]
    return ShearingError(
        "estimator",
        value=name,
        allowed=f"{' or '.join(able)} with a parameter budget: its sizes are free, and only there something pulls them",
        mend=f"write {able[0]}, or give the target's sizes by name",
    )
