"""What a recipe has to know of every criterion, said once, and without torch.

A new criterion is a file beside this one and a line in `CRITERIA`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shearing.pruning.calibration.statistics import Need
    from shearing.pruning.sparse.reconstruction.facts import Group, ReconstructionName


@dataclass(frozen=True)
class CriterionFacts:
    """What is known of a criterion before anything is computed.

    Attributes:
        home: `module:class`.
        needs: statistics of the inputs that scores are made of; where it is empty, no text is read.
        group: as published.
        reconstruction: what is done about the weights that go, as published.
    """

    home: str
    needs: frozenset[Need]
    group: Group
    reconstruction: ReconstructionName


CRITERIA: Mapping[str, CriterionFacts] = {
    "magnitude": CriterionFacts(
        home="shearing.pruning.sparse.criteria.magnitude:Magnitude",
        needs=frozenset(),
        group="layer",
        reconstruction="none",
    ),
    "wanda": CriterionFacts(
        home="shearing.pruning.sparse.criteria.wanda:Wanda",
        needs=frozenset({"squares"}),
        group="row",
        reconstruction="none",
    ),
    "sparsegpt": CriterionFacts(
        home="shearing.pruning.sparse.criteria.sparsegpt:SparseGPT",
        needs=frozenset({"moment"}),
        group="layer",
        reconstruction="obs",
    ),
    "ria": CriterionFacts(
        home="shearing.pruning.sparse.criteria.ria:RelativeImportance",
        needs=frozenset({"squares"}),
        group="layer",
        reconstruction="none",
    ),
    "isc": CriterionFacts(
        home="shearing.pruning.sparse.criteria.isc:ImprovedSaliency",
        needs=frozenset({"moment"}),
        group="layer",
        reconstruction="obs",
    ),
    "gblm": CriterionFacts(
        home="shearing.pruning.sparse.criteria.gblm:GradientBased",
        needs=frozenset({"squares", "gradients"}),
        group="row",
        reconstruction="none",
    ),
}
"""By name, as recipes say it."""

if TYPE_CHECKING:
    CriterionName = str
else:
    CriterionName = Literal[tuple(CRITERIA)]
