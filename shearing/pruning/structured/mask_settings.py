"""How masks are learned, in steps: the recipe's section `prune` for a stage of known length."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.pruning.structured.recipe import PruneRecipe
from shearing.settings.quantities import Duration


@dataclass(frozen=True, kw_only=True)
class MaskSettings:
    """How masks are learned; durations in steps. Defaults are those of `PruneRecipe`, see `of`.

    Attributes:
        total_steps: length of the stage.
        sparsity_warmup_steps: linear ramp of the target from nothing pruned to the target.
        freeze_step: first step with fixed binary masks at the target shape; the learning rates' cosine ends here.
        warmup_steps: linear warm-up of the learning rates.
        mask_learning_rate, multiplier_learning_rate: peak rates of log_alpha (descent) and multipliers (ascent).
        final_learning_rate: both rates at the freeze, share of the peak.
        quadratic_penalty: constant part of every lambda_2.
        temperature: beta of the hard concrete distribution.
        log_alpha_limit: log_alpha is kept within plus and minus this.
        warm_start_scale, warm_start_step: steepness of a graded start, see `grade`.
        seed: of the noise.
    """

    total_steps: int
    sparsity_warmup_steps: int
    freeze_step: int
    warmup_steps: int
    mask_learning_rate: float
    multiplier_learning_rate: float
    final_learning_rate: float
    quadratic_penalty: float
    temperature: float
    log_alpha_limit: float
    warm_start_scale: float
    warm_start_step: float
    seed: int

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
            mask_learning_rate=prune.mask_learning_rate,
            multiplier_learning_rate=prune.multiplier_learning_rate,
            final_learning_rate=prune.final_learning_rate,
            quadratic_penalty=prune.quadratic_penalty,
            temperature=prune.temperature,
            log_alpha_limit=prune.log_alpha_limit,
            warm_start_scale=prune.warm_start_scale,
            warm_start_step=prune.warm_start_step,
            seed=seed,
        )
