"""Recipe section `prune`: how masks are learned."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shearing.errors import ShearingError, key
from shearing.pruning.structured.estimators.registry import ESTIMATORS, no_budget
from shearing.pruning.structured.importance.registry import complete_metrics
from shearing.pruning.structured.masking.facts import MASKINGS
from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe
from shearing.settings.quantities import Duration
from shearing.settings.section import Fraction, Positive, formerly
from shearing.training.recipe import StageRecipe

GranularityName = Literal["layers", "sublayers", "kv_groups", "query_heads", "intermediate", "experts", "hidden"]
STARTS = ("open", *complete_metrics())

if TYPE_CHECKING:
    StartName = str
    MaskingName = str
    EstimatorName = str
else:
    StartName = Annotated[Literal[STARTS], formerly(importance="activations")]
    MaskingName = Literal[tuple(MASKINGS)]
    EstimatorName = Literal[tuple(ESTIMATORS)]


class PruneRecipe(StageRecipe):
    """Mask learning (Sheared LLaMA, section 2.1)."""

    duration: Duration = Field(
        description="Length of the stage: '3200 steps' or '0.4B tokens'; 0: nothing is trained before the cut, which "
        "is of what initial_masks grades, refitted."
    )
    granularities: list[GranularityName] = Field(
        ["layers", "kv_groups", "query_heads", "intermediate", "hidden"],
        description="What may be pruned; `sublayers` replaces `layers` to mask attention and MLP apart; `experts`, of "
        "models that have some, with their rows of the router.",
    )
    masks: MaskingName = Field(
        "learned",
        description="How units go. " + "; ".join(f"{name}: {facts.summary}" for name, facts in MASKINGS.items()) + ". "
        "Keys of the masks' learning, of their start and `compensate` are of learned alone.",
    )
    removal_stages: int = Field(4, ge=1, description="Of masks: staged; the first begins with a removal too.")
    saliency_window: Duration = Field(
        Duration(steps=2),
        description="Steps whose gradients a removal goes by. staged: those before it; gradual: from one to the next.",
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
        "not make up for (reconstruction). Or everything by gradients: what the loss would change without a unit "
        "(taylor, taylor_second, taylor_vector), or the distance to the source (taylor_distillation). Or all that the "
        "target takes from by masks that are tried on this text: by forward passes alone "
        "(policy_gradient), or by gates at exactly the target shape (hard_budget, from chance; hard_budget_graded, "
        "from activations).",
    )
    compensate: bool = Field(
        True,
        description="Before the first step, refit the weights that stay so that they make up for the units that a "
        "graded start closes (least squares, layer by layer); only with sparsity_warmup 0.",
    )
    refit_ridge: Positive | Literal["auto"] = Field(
        1.5,
        description="How strongly `compensate` holds weights where they are, as a share of what they read. auto: for "
        "each matrix the one whose refit to four fifths of the calibration text leaves least on the other fifth.",
    )
    block_refit: BlockRefitRecipe | None = Field(
        None, description="Steps of each block by itself after `compensate`; null: none."
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
    rotate: Literal["none", "pca"] = Field(
        "none",
        description="pca: the residual stream is first rotated into the principal components of what norms read on "
        "`calibration_tokens`, so that hidden dimensions that go are directions. The rotated model computes the same "
        "function; where the head is the embedding, see rotate_tied.",
    )
    rotate_tied: Literal["refuse", "untie", "diagonal"] = Field(
        "refuse",
        description="Of a rotation where the head is the embedding, so that the last norm's gain has no place to go. "
        "untie: the head becomes a matrix of its own, in the result too, and parameters count it; diagonal: the gain "
        "is fitted, which changes the function by what is said; refuse: neither.",
    )
    moments_of: Path | None = Field(
        None,
        description="Folder of the run that has trained the source model: its optimiser's state goes on. null: from "
        "nothing. A `cascade` sets it.",
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

    @property
    def unties(self) -> bool:
        """Whether a rotation gives a tied head weights of its own."""
        return self.rotate != "none" and self.rotate_tied == "untie"

    def refits(self, *, sequence_length: int) -> bool:
        """Whether the weights that stay are refitted before the first step, as `compensate` says.

        Args:
            sequence_length: tokens of a sequence.
        """
        ramp = self.in_steps(self.sparsity_warmup, sequence_length=sequence_length)
        return self.compensate and self.graded_by is not None and not ramp

    @property
    def graded_by(self) -> str | None:
        """The metric that grades where masks start; None where every unit is open."""
        return None if self.initial_masks == "open" or self.masks != "learned" else self.initial_masks


def stage_ends(prune: PruneRecipe, *, tokens_per_step: int) -> tuple[list[int], int]:
    """Of `masks: staged`, steps done before the removal of each stage, and the steps that each is measured on.

    After M steps the first stage begins; with S steps of `prune`, stage t trains a share 2 t / (T (T + 1)) of S - M.
    """
    total = prune.duration.in_steps(tokens_per_step=tokens_per_step)
    window = max(1, prune.saliency_window.in_steps(tokens_per_step=tokens_per_step, total_steps=total))
    count = prune.removal_stages
    rest = max(0, total - window)
    return [window + rest * stage * (stage + 1) // (count * (count + 1)) for stage in range(count)], window


def removal_steps(prune: PruneRecipe, *, tokens_per_step: int) -> list[int]:
    """Of `masks: gradual`, steps done before each removal, until the masks are fixed."""
    total = prune.duration.in_steps(tokens_per_step=tokens_per_step)
    window = max(1, prune.saliency_window.in_steps(tokens_per_step=tokens_per_step, total_steps=total))
    freeze = prune.freeze.in_steps(tokens_per_step=tokens_per_step, total_steps=total)
    return list(range(window, total - freeze + 1, window))


def masking_contradictions(prune: PruneRecipe, *, budget: bool, tokens_per_step: int) -> Iterator[ShearingError]:
    """A way in which units go that cannot reach what is asked for, or not in so few steps.

    Args:
        prune: the section.
        budget: whether the target is a number of parameters.
        tokens_per_step: of a global batch.
    """
    if not prune.duration.in_steps(tokens_per_step=tokens_per_step):
        yield from _cut_at_once_contradictions(prune, budget=budget)
        return
    if budget and not MASKINGS[prune.masks].budgets:
        yield ShearingError(
            "masks",
            value=prune.masks,
            allowed=f"{', '.join(name for name, facts in MASKINGS.items() if facts.budgets)} with a target in "
            f"{key('parameters')}: the others need its sizes",
            mend=f"give sizes by name instead of {key('parameters')}, or set {key('masks')}=learned",
        )
    if prune.masks != "learned" and "sublayers" in prune.granularities:
        yield ShearingError(
            "granularities",
            value=prune.granularities,
            allowed=f"layers instead of sublayers with {key('masks')}={prune.masks}: those that stay have to alternate",
            mend=f"write layers, or set {key('masks')}=learned",
        )
    if prune.masks == "staged":
        ends, _ = stage_ends(prune, tokens_per_step=tokens_per_step)
        total = prune.duration.in_steps(tokens_per_step=tokens_per_step)
        if any(after <= before for before, after in pairwise([*ends, total])):
            yield ShearingError(
                "removal_stages",
                value=prune.removal_stages,
                allowed=f"so few that the shortest has a step: {prune.removal_stages} stages of {total} steps begin "
                f"after steps {', '.join(map(str, ends))}",
                mend=f"lower it or {key('saliency_window')}, or train for longer",
            )
    if prune.masks == "gradual" and not removal_steps(prune, tokens_per_step=tokens_per_step):
        yield ShearingError(
            "saliency_window",
            value=str(prune.saliency_window),
            allowed=f"at most the steps before {key('freeze')} = {prune.freeze}",
            mend=f"shorten it, or {key('freeze')}",
        )


def _cut_at_once_contradictions(prune: PruneRecipe, *, budget: bool) -> Iterator[ShearingError]:
    """What a stage of no steps cannot do: its start is its end."""
    if prune.graded_by is None or budget:
        needed = "sizes by name" if budget else f"{key('masks')}=learned and {key('initial_masks')} other than open"
        yield ShearingError(
            "duration",
            value=str(prune.duration),
            allowed=f"at least one step, or 0 with {needed}: units then go by their scores alone",
            mend=f"write a longer {key('duration')}, or give {needed}",
        )
    elif prune.sparsity_warmup.steps or prune.sparsity_warmup.tokens:
        yield ShearingError(
            "sparsity_warmup",
            value=str(prune.sparsity_warmup),
            allowed=f"0 with {key('duration')} = 0: there is no step to ramp in",
            mend=f"set {key('sparsity_warmup')}=0",
        )


def estimator_contradictions(prune: PruneRecipe, *, budget: bool) -> Iterator[ShearingError]:
    """An estimator that cannot reach what is asked for.

    Args:
        prune: the section.
        budget: whether the target is a number of parameters.
    """
    if budget and not ESTIMATORS[prune.estimator].budgets:
        yield no_budget(prune.estimator)


def refit_contradictions(prune: PruneRecipe, *, sequence_length: int) -> Iterator[ShearingError]:
    """Steps of blocks after a refit that there is not.

    Args:
        prune: the section.
        sequence_length: tokens of a sequence.
    """
    if prune.block_refit is not None and not prune.refits(sequence_length=sequence_length):
        yield ShearingError(
            "block_refit",
            value=f"{prune.block_refit.steps} steps",
            allowed=f"steps after a refit: {key('compensate')}, a graded start and no {key('sparsity_warmup')}",
            mend=f"set those, or {key('block_refit')}=null",
        )


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
