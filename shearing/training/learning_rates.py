"""Learning rates as functions of the step alone: what a stage's schedule says, wherever training was interrupted.

Legend, in optimiser steps: t the step of the schedule, from 0; W warm-up; T length of the schedule; D decay; r the rate
after T steps as a share of the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from typing_extensions import Self

from shearing.training.recipe import ScheduleName, StageRecipe


@dataclass(frozen=True, kw_only=True)
class LearningRates:
    """The rates of a stage's steps: of a schedule of its own, or of its part of one that several stages share.

    Every schedule begins with a linear warm-up, (t + 1) / W of the peak while t < W, and is continuous: the last step
    of the warm-up and the first one after it are at the peak. Then, with p = (t - W) / (T - W), it is the peak times

    - cosine: r + (1 - r) (1 + cos(pi p)) / 2 (SGDR, arXiv 1608.03983, equation 5, without restarts; Sheared LLaMA,
      arXiv 2310.06694, table 7, with r = 0.1)
    - linear: r + (1 - r) (1 - p) (arXiv 2310.07831)
    - constant: 1
    - wsd (warm-up, stable, decay: MiniCPM, arXiv 2404.06395, section 4): 1 while t < T - D, then
      r + (1 - r) (T - t) / D, the linear cooldown of arXiv 2405.18392. Until T - D it does not depend on T.

    Attributes:
        schedule: which of these.
        peak: highest learning rate.
        total_steps: T.
        warmup_steps: W.
        decay_steps: D, of wsd.
        final: r.
        first_step: t of the stage's first step: steps of the stages before it that follow the same schedule.
    """

    schedule: ScheduleName
    peak: float
    total_steps: int
    warmup_steps: int
    decay_steps: int
    final: float
    first_step: int

    @classmethod
    def of(cls, stage: StageRecipe, *, tokens_per_step: int, before: int = 0, after: int = 0) -> Self:
        """What a recipe says of a stage.

        Args:
            stage: its section; shares are of the whole schedule.
            tokens_per_step: of a global batch.
            before, after: steps of other stages that follow the same schedule.
        """
        total = before + stage.duration.in_steps(tokens_per_step=tokens_per_step) + after
        return cls(
            schedule=stage.schedule,
            peak=stage.learning_rate,
            total_steps=total,
            warmup_steps=stage.warmup.in_steps(tokens_per_step=tokens_per_step, total_steps=total),
            decay_steps=stage.decay.in_steps(tokens_per_step=tokens_per_step, total_steps=total),
            final=stage.final_learning_rate,
            first_step=before,
        )

    def at(self, step: int) -> float:
        """Learning rate of the step of the stage that follows `step` done ones."""
        step += self.first_step
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        # Exactly the peak at its height, whatever the end.
        return self.peak * (1 - (1 - self.final) * (1 - self._height(step)))

    def height_at(self, step: int) -> float:
        """How high the rate of that step is, whatever the end: from 0 up to 1 in the warm-up, 0 where the decay ends.

        Args:
            step: of the stage, as of `at`.
        """
        step += self.first_step
        return (step + 1) / self.warmup_steps if step < self.warmup_steps else self._height(step)

    def _height(self, step: int) -> float:
        """Where between the end, 0, and the peak, 1, the rate is after the warm-up."""
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "linear":
            return 1 - progress
        if self.schedule == "wsd" and self.decay_steps:
            return min(max((self.total_steps - step) / self.decay_steps, 0.0), 1.0)
        return 1.0

    @property
    def stable_steps(self) -> int | None:
        """Steps of the stage before the decay of wsd, from after which any other decay may begin; None without one."""
        stable = self.total_steps - self.decay_steps - self.first_step
        return stable if self.schedule == "wsd" and self.decay_steps and stable > 0 else None
