"""The ways in which units go while weights are trained, by name. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MaskingFacts:
    """What is to be known of a way before it is imported.

    Attributes:
        home: `module:class`.
        title: what tables call a choice of units by it.
        summary: what it does, in words for the reference of keys.
        source: where it stands, as `arXiv 2502.03460`.
        reconstructed: its exact rule is not public, and this is our reading of it: no figure of it is the paper's.
        budgets: whether the target may be a number of parameters.
    """

    home: str
    title: str
    summary: str
    source: str
    reconstructed: bool = False
    budgets: bool = False


_HERE = "shearing.pruning.structured.masking"

MASKINGS: dict[str, MaskingFacts] = {
    "learned": MaskingFacts(
        home=f"{_HERE}.learned:Masking",
        title="learned masks",
        summary="masks are learned with the weights",
        source="arXiv 2310.06694",
        budgets=True,
    ),
    "staged": MaskingFacts(
        home=f"{_HERE}.staged:StagedRemoval",
        title="staged masks",
        summary="in `removal_stages` stages of pruning and training, later ones longer (Adapt-Pruner, uniform here)",
        source="arXiv 2502.03460",
    ),
    "gradual": MaskingFacts(
        home=f"{_HERE}.gradual:GradualRemoval",
        title="gradual masks",
        summary="unit after unit, of whichever kind matters least, until `freeze` (EfficientLLM, a reconstruction)",
        source="arXiv 2502.06663",
        reconstructed=True,
    ),
}
