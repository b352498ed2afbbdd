"""What a step minimises, from tokens to a loss and its gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.objectives.cross_entropy import causal_lm_loss, per_token_loss
    from shearing.objectives.language_model import LanguageModelLoss
    from shearing.objectives.objective import Losses, Objective, Parts, objective_of
    from shearing.objectives.registry import OBJECTIVES

__all__ = [
    "OBJECTIVES",
    "LanguageModelLoss",
    "Losses",
    "Objective",
    "Parts",
    "causal_lm_loss",
    "objective_of",
    "per_token_loss",
]

__getattr__ = late(
    __name__,
    {
        "LanguageModelLoss": "language_model",
        "Losses": "objective",
        "OBJECTIVES": "registry",
        "Objective": "objective",
        "Parts": "objective",
        "causal_lm_loss": "cross_entropy",
        "objective_of": "objective",
        "per_token_loss": "cross_entropy",
    },
)
