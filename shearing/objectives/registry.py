"""Objectives and divergences by name; importing this imports no torch: recipes take values from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

OBJECTIVES: dict[str, str] = {
    "language_model": "shearing.objectives.language_model:LanguageModelLoss",
    "distillation": "shearing.objectives.distillation:Distillation",
}
"""Name -> the class that is one, as `module:class`; see `objective.objective_of`."""


@dataclass(frozen=True, kw_only=True)
class DivergenceFacts:
    """What is known of a divergence before it is imported.

    Attributes:
        home: `module:function`.
        summary: what it is, as the documentation of recipes says it.
        keeps_some: whether it takes the number of tokens that it keeps.
        buffers: tensors [C, V] of the sums' dtype that it holds beside the two distributions.
    """

    home: str
    summary: str
    keeps_some: bool = False
    buffers: int


DIVERGENCES: dict[str, DivergenceFacts] = {
    "forward_kl": DivergenceFacts(
        home="shearing.objectives.divergences:forward_kl",
        summary="KL from the teacher to the model, which has to cover all that the teacher finds likely",
        buffers=1,
    ),
    "reverse_kl": DivergenceFacts(
        home="shearing.objectives.divergences:reverse_kl",
        summary="KL the other way round, which lets the model keep to what it can do",
        buffers=0,
    ),
    "jsd": DivergenceFacts(
        home="shearing.objectives.divergences:jensen_shannon",
        summary="Jensen-Shannon, in between",
        buffers=2,
    ),
    "top_k": DivergenceFacts(
        home="shearing.objectives.divergences:top_k_and_tail",
        summary="forward KL over the teacher's likeliest tokens and one class of all others",
        keeps_some=True,
        buffers=1,
    ),
}
"""By name, as recipes say it."""

if TYPE_CHECKING:
    DivergenceName = str
else:
    DivergenceName = Literal[tuple(DIVERGENCES)]
"""The name of a divergence."""
