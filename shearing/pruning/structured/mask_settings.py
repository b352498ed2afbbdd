"""How masks are learned, in steps: the recipe's section `prune` for a stage of known length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from shearing.pruning.structured.recipe import PruneRecipe
from shearing.settings.quantities import Duration

BAND = 2 * math.log(100.0)
"""By how much log_alpha falls over the units of a row that are in doubt: from ln 100 to -ln 100, between which the
released code of Sheared LLaMA keeps it, as beyond a draw is certain."""

CROSSINGS = 2.0
"""How often a unit that every step pushes the same way crosses the doubtful band, at the rate `auto`."""

_WHOLLY_IN_DOUBT = 32


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How masks are learned; durations in steps. Defaults are those of `PruneRecipe`, see `of`.

    Attributes:
        total_steps: length of the stage.
        sparsity_warmup_steps: linear ramp of the target from nothing pruned to the target.
        freeze_step: first step with fixed binary masks at the target shape; the learning rates' cosine ends here.
        warmup_steps: linear warm-up of the learning rates.
        estimator: name in `ESTIMATORS`.
        mask_learning_rate: peak rate of log_alpha (descent); None: what `mask_rate` says.
        multiplier_learning_rate: that of multipliers (ascent).
        final_learning_rate: both rates at the freeze, share of the peak.
        quadratic_penalty: constant part of every lambda_2.
        temperature: beta of the hard concrete distribution.
        log_alpha_limit: log_alpha is kept within plus and minus this.
        doubtful_share: of a row, see `units_in_doubt`.
        seed: of the noise.
    """

    total_steps: int
    sparsity_warmup_steps: int
    freeze_step: int
    warmup_steps: int
    estimator: str
    mask_learning_rate: float | None
    multiplier_learning_rate: float
    final_learning_rate: float
    quadratic_penalty: float
    temperature: float
    log_alpha_limit: float
    doubtful_share: float
    seed: int

    def rate_factor(self, step: int) -> float:
        """Both learning rates at `step`, share of their peaks: linear warm-up, then a cosine down to the freeze."""
        warmup = min(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = min(1.0, max(0, step - self.warmup_steps) / max(1, self.freeze_step - self.warmup_steps))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return warmup * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)

    @cached_property
    def mask_rate(self) -> float:
        """Peak learning rate of log_alpha; where none is given, `CROSSINGS` of the band in the steps that move masks.

        So how far masks can move depends on neither the length of a row nor the number of steps.
        """
        if self.mask_learning_rate is not None:
            return self.mask_learning_rate
        moving = sum(self.rate_factor(step) for step in range(self.freeze_step))
        return CROSSINGS * BAND / moving if moving else 0.0

    def units_in_doubt(self, units: int) -> int:
        """Units around the cut of a row of `units` that start in doubt: all of a short row, else a share of it."""
        return min(units, max(_WHOLLY_IN_DOUBT, round(self.doubtful_share * units)))

    @classmethod
    def of(cls, prune: PruneRecipe, *, tokens_per_step: int, seed: int) -> MaskSettings:
        """The settings of a recipe's section.

        Args:
            prune: the section.
            tokens_per_step: tokens of one global batch.
            seed: the recipe's.
        """
        total_steps = prune.duration.in_steps(tokens_per_step=tokens_per_step)

        def in_steps(duration: Duration) -> int:
            return duration.in_steps(tokens_per_step=tokens_per_step, total_steps=total_steps)

        return cls(
            total_steps=total_steps,
            sparsity_warmup_steps=in_steps(prune.sparsity_warmup),
            freeze_step=total_steps - in_steps(prune.freeze),
            warmup_steps=in_steps(prune.warmup),
            estimator=prune.estimator,
            mask_learning_rate=None if prune.mask_learning_rate == "auto" else prune.mask_learning_rate,
            multiplier_learning_rate=prune.multiplier_learning_rate,
            final_learning_rate=prune.final_learning_rate,
            quadratic_penalty=prune.quadratic_penalty,
            temperature=prune.temperature,
            log_alpha_limit=prune.log_alpha_limit,
            doubtful_share=prune.doubtful_share,
            seed=seed,
        )


def doubts(settings: MaskSettings, *, opens: bool) -> Iterator[str]:
    """What keys of a recipe say against each other, where nothing is wrong with any of them; a sentence each.

    Args:
        settings: of the recipe.
        opens: whether every unit starts open.
    """
    if not settings.freeze_step:
        return
    if opens and not settings.sparsity_warmup_steps:
        yield "initial_masks=open without sparsity_warmup: the first step is at the target, and what it keeps is chance"
    if settings.estimator != "hard_concrete":
        return
    travel = settings.mask_rate * sum(settings.rate_factor(step) for step in range(settings.freeze_step))
    needed = settings.log_alpha_limit if opens else BAND / 2
    if travel < needed:
        yield (
            f"at mask_learning_rate={settings.mask_rate:g} log_alpha moves by {travel:.2g} at most in the "
            f"{settings.freeze_step} steps before freeze, and {needed:.2g} lie between a unit and the other side: "
            "hardly any unit can change. auto fits the rate to the steps"
        )
    if settings.mask_rate >= 0.5 and settings.log_alpha_limit > BAND / 2 + 0.01:
        yield (
            f"at mask_learning_rate={settings.mask_rate:g} masks run into log_alpha_limit="
            f"{settings.log_alpha_limit:g}, where no draw has a gradient: what stays is chance. The paper's rate goes "
            "with log_alpha_limit=4.605"
        )
