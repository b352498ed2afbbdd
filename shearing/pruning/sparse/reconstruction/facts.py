"""What a recipe has to know of every reconstruction, said once, and without torch.

A new reconstruction is a file beside this one and a line in `RECONSTRUCTIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from shearing.pruning.calibration.statistics import Need


Group = Literal["row", "layer", "cumulative"]
"""Weights that are compared with each other where the pattern is unstructured."""


@dataclass(frozen=True)
class ReconstructionFacts:
    """What is known of a reconstruction before anything is computed.

    Attributes:
        home: `module:class`.
        needs: statistics of the inputs that it works with; where it is empty, no text is read.
        group: in the code released with it; None: the criterion's.
    """

    home: str
    needs: frozenset[Need]
    group: Group | None = None


RECONSTRUCTIONS: Mapping[str, ReconstructionFacts] = {
    "none": ReconstructionFacts(home="shearing.pruning.sparse.reconstruction.none:NoReconstruction", needs=frozenset()),
    "obs": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.obs:OptimalBrainSurgeon", needs=frozenset({"moment"})
    ),
    "dsnot": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.dsnot:DynamicSparseNoTraining",
        needs=frozenset({"sums", "squares"}),
        group="row",
    ),
    "admm": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.admm:Admm", needs=frozenset({"moment"}), group="layer"
    ),
    "admm_gradual": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.admm:GradualAdmm", needs=frozenset({"moment"}), group="layer"
    ),
    "closed_form": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.closed_form:ClosedForm", needs=frozenset({"moment"})
    ),
    "alps": ReconstructionFacts(
        home="shearing.pruning.sparse.reconstruction.alps:Alps", needs=frozenset({"moment"}), group="layer"
    ),
}
"""By name, as recipes say it."""

if TYPE_CHECKING:
    ReconstructionName = str
else:
    ReconstructionName = Literal[tuple(RECONSTRUCTIONS)]
