"""Recipe section `prune`: how masks are learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shearing.errors import ShearingError
from shearing.pruning.structured.estimators.registry import ESTIMATORS, no_budget
from shearing.pruning.structured.importance.registry import complete_metrics
from shearing.settings.quantities import Duration
from shearing.settings.section import Fraction, Positive
from shearing.training.recipe import StageRecipe

GranularityName = Literal["layers", "sublayers", "kv_groups", "query_heads", "intermediate", "hidden"]
STARTS = ("open", *complete_metrics())

if TYPE_CHECKING:
    StartName = EstimatorName = str
else:
    StartName, EstimatorName = Literal[STARTS], Literal[tuple(ESTIMATORS)]


class PruneRecipe(StageRecipe):
    """Mask learning (Sheared LLaMA, section 2.1)."""

    granularities: list[GranularityName] = Field(
        ["layers", "kv_groups", "query_heads", "intermediate", "hidden"],
        description="What may be pruned; `sublayers` replaces `layers` to mask attention and MLP apart.",
    )
    estimator: EstimatorName = Field(
        "straight_through",
        description="; ".join(f"{name}: {facts.summary}" for name, facts in ESTIMATORS.items()) + ".",
    )
    mask_learning_rate: Positive | Literal["auto"] = Field(
        "auto",
        description="Of hard_concrete: learning rate of log_alpha (the paper's: 1.0). auto: a unit that every step "
        "pushes the same way crosses the doubtful band twice before `freeze`, whatever the number of steps.",
    )
    multiplier_learning_rate: Positive = Field(
        1.0, description="Learning rate (ascent) of the multipliers of hard_concrete."
    )
    quadratic_penalty: float = Field(
        500.0,
        ge=0.0,
        description="Of hard_concrete: constant added to every lambda_2, so that sizes are held from the first step; "
        "paper: 0.",
    )
    temperature: Positive = Field(2 / 3, description="Temperature of the hard concrete distribution (beta).")
    sparsity_warmup: Duration = Field(
        Duration(steps=0), description="Linear ramp of the target sparsity; 0: a graded start is at the target."
    )
    initial_masks: StartName = Field(
        "reconstruction",
        description="open: every unit alive (paper). Else graded by importance: layers and hidden dimensions by their "
        "activations; heads and intermediate units likewise (activations), or by what the others of their layer could "
        "not make up for (reconstruction).",
    )
    compensate: bool = Field(
        True,
        description="Before the first step, refit the weights that stay so that they make up for the units that a "
        "graded start closes (least squares, layer by layer); only with sparsity_warmup 0.",
    )
    log_alpha_limit: Positive = Field(
        10.0,
        description="log_alpha stays within plus and minus this; at the released code's 4.605 (ln 100) even a unit "
        "that is certain to stay is drawn below 1 in 4.7 % of all cases.",
    )
    doubtful_share: Fraction = Field(
        0.2,
        description="Share of a row's units, around the cut, that a graded start leaves in doubt; rows of up to 32 "
        "units are in doubt as a whole.",
    )
    calibration_tokens: int = Field(
        65_536, ge=2, description="Tokens read for initial_masks and compensate: the first ones of training."
    )
    mask_draws: int = Field(
        1,
        ge=1,
        description="Of hard_concrete: draws of the masks' noise in a step, each for an equal share of its batch; more "
        "make the masks' gradient less noisy. The same draws whatever the number of processes and micro-batches.",
    )
    freeze: Duration = Field(
        Duration(fraction=0.5), description="Last stretch in which masks are fixed at the exact target shape."
    )

    def refits(self, *, sequence_length: int) -> bool:
        """Whether the weights that stay are refitted before the first step, as `compensate` says.

        Args:
            sequence_length: tokens of a sequence.
        """
        ramp = self.in_steps(self.sparsity_warmup, sequence_length=sequence_length)
        return self.compensate and self.initial_masks != "open" and not ramp


def estimator_contradictions(prune: PruneRecipe, *, budget: bool) -> Iterator[ShearingError]:
    """An estimator that cannot reach what is asked for.

    Args:
        prune: the section.
        budget: whether the target is a number of parameters.
    """
    if budget and not ESTIMATORS[prune.estimator].budgets:
        yield no_budget(prune.estimator)


def granularity_contradictions(prune: PruneRecipe) -> Iterator[ShearingError]:
    """Granularities that are named twice, or exclude each other."""
    chosen = prune.granularities
    if len(set(chosen)) < len(chosen) or not chosen:
        yield ShearingError(
            "granularities",
            value=chosen,
            allowed="at least one granularity, each once",
            mend=f"write {list(dict.fromkeys(chosen)) or ['hidden']}",
        )
    if {"layers", "sublayers"} <= set(chosen):
        yield ShearingError(
            "granularities",
            value=chosen,
            allowed="layers (attention and MLP go together) or sublayers (apart)",
            mend="remove one of the two",
        )
