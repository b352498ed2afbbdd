"""AdamW with its schedule, as every engine has it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import Self

from shearing.training.checkpoints.pieces import MOMENTS, STEP
from shearing.training.recipe import StageRecipe


@dataclass(frozen=True)
class Optimization:
    """AdamW with a cosine schedule after a linear warm-up (arXiv 2310.06694, table 7).

    Args:
        learning_rate: peak.
        total_steps: length of the schedule, in optimiser steps.
        warmup_steps: steps until the peak.
        final_learning_rate: learning rate after `total_steps`, share of the peak.
        betas: AdamW betas.
        epsilon: AdamW epsilon.
        weight_decay: decoupled weight decay; matrices only, not biases and norms.
        gradient_clipping: maximum global norm of the gradient; 0: none.
    """

    learning_rate: float
    total_steps: int
    warmup_steps: int
    final_learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    gradient_clipping: float

    @classmethod
    def of(cls, stage: StageRecipe, *, tokens_per_step: int) -> Self:
        """What a recipe says of a stage.

        Args:
            stage: its section.
            tokens_per_step: of a global batch.
        """
        total = stage.duration.in_steps(tokens_per_step=tokens_per_step)
        return cls(
            learning_rate=stage.learning_rate,
            total_steps=total,
            warmup_steps=stage.warmup.in_steps(tokens_per_step=tokens_per_step, total_steps=total),
            final_learning_rate=stage.final_learning_rate,
            betas=stage.betas,
            epsilon=stage.epsilon,
            weight_decay=stage.weight_decay,
            gradient_clipping=stage.gradient_clipping,
        )

    def height_at(self, step: int) -> float:
        """How far the learning rate of the step that follows `step` done ones is above its end: 0 there, 1 at the peak.

        A rate that does not fall is measured from 0; one that warms up from below its end is at 0 until it is above.
        """
        end = self.final_learning_rate if self.final_learning_rate < 1 else 0.0
        return max(0.0, (self.learning_rate_at(step) / self.learning_rate - end) / (1 - end))

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the step that follows `step` done ones."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.learning_rate * (self.final_learning_rate + (1 - self.final_learning_rate) * cosine)


def adamw(parameters: Iterable[nn.Parameter], *, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay of matrices alone."""
    chosen = list(parameters)
    # A parameter that ZeRO-3 has cut up is flat; its own shape is elsewhere.
    matrices = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [(matrices, optimization.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": of_group, "weight_decay": decay} for of_group, decay in groups if of_group],
        lr=optimization.learning_rate,
        betas=optimization.betas,
        eps=optimization.epsilon,
        fused=True,
    )


def start_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW's state of step 0, which it would make itself in its first step: so that there is something to restore."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                STEP: torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{kind: torch.zeros_like(parameter, memory_format=torch.preserve_format) for kind in MOMENTS},
            }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def set_steps(optimizer: torch.optim.Optimizer, step: float) -> None:
    """AdamW's step count of all parameters, in a tensor of its own for each."""
    for state in optimizer.state.values():
        state[STEP] = torch.full((), step, dtype=torch.float32, device=state[MOMENTS[0]].device)
