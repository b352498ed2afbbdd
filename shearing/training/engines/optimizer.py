"""AdamW with its schedule, as every engine has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import Self

from shearing.training.checkpoints.pieces import MOMENTS, STEP
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import StageRecipe


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW and its learning rates.

    Args:
        rates: of each step of the stage.
        betas: AdamW betas.
        epsilon: AdamW epsilon.
        weight_decay: decoupled weight decay; matrices only, not biases and norms.
        gradient_clipping: maximum global norm of the gradient; 0: none.
    """

    rates: LearningRates
    betas: tuple[float, float]
    epsilon: float
    weight_decay: float
    gradient_clipping: float

    @classmethod
    def of(cls, stage: StageRecipe, *, rates: LearningRates) -> Self:
        """What a recipe says of a stage.

        Args:
            stage: its section.
            rates: the stage's, see `LearningRates.of`.
        """
        return cls(
            rates=rates,
            betas=stage.betas,
            epsilon=stage.epsilon,
            weight_decay=stage.weight_decay,
            gradient_clipping=stage.gradient_clipping,
        )


def adamw(parameters: Iterable[nn.Parameter], *, optimization: Optimization) -> torch.optim.AdamW:
    """AdamW with weight decay of matrices alone."""
    chosen = list(parameters)
    # A parameter that ZeRO-3 has cut up is flat; its own shape is elsewhere.
    matrices = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) >= 2]
    vectors = [p for p in chosen if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups = [(matrices, optimization.weight_decay), (vectors, 0.0)]
    return torch.optim.AdamW(
        [{"params": of_group, "weight_decay": decay} for of_group, decay in groups if of_group],
        lr=optimization.rates.peak,
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


def count_step(optimizer: torch.optim.Optimizer, *, skipped: torch.Tensor) -> None:
    """Count a step for parameters that it had no gradient of, too: AdamW's clock is one for all.

    Args:
        optimizer: whose step has been, and whose gradients are still there.
        skipped: boolean scalar on the device: whether it changed nothing.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not parameter.requires_grad:
                optimizer.state[parameter][STEP] += (~skipped).float()


def set_steps(optimizer: torch.optim.Optimizer, step: float) -> None:
    """AdamW's step count of all parameters, in a tensor of its own for each."""
    for state in optimizer.state.values():
        state[STEP] = torch.full((), step, dtype=torch.float32, device=state[MOMENTS[0]].device)
