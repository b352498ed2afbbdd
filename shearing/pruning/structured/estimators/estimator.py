"""What an estimator does: masks out of log_alpha, and steps of log_alpha."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from shearing.pruning.structured.constraint import Constraint
from shearing.pruning.structured.mask_settings import MaskSettings


class Estimator(ABC):
    """How the masks of a step come out of log_alpha, and how the loss moves log_alpha.

    Args:
        log_alpha: by granularity; what is learned.
        constraint: sizes to reach.
        settings: rates and durations.
        rounded: binary masks by granularity of the best units, as many as the constraint asks for at a step.
    """

    def __init__(
        self,
        log_alpha: Mapping[str, nn.Parameter],
        *,
        constraint: Constraint,
        settings: MaskSettings,
        rounded: Callable[[int], dict[str, Tensor]],
    ) -> None:
        self._log_alpha, self._constraint, self._settings, self._rounded = log_alpha, constraint, settings, rounded
        self.multipliers: nn.Module = nn.Module()

    @abstractmethod
    def masks(self, *, step: int, draw: int) -> dict[str, Tensor]:
        """Masks of one share of a step's batch, differentiable in log_alpha; a function of its values, step and draw."""

    @abstractmethod
    def alive(self, *, step: int) -> dict[str, Tensor]:
        """Expected share alive of every unit at `step`; granularity -> the shape of its log_alpha."""

    @abstractmethod
    def is_open(self, *, step: int) -> dict[str, Tensor]:
        """Units that masks of `step` keep by themselves, before any rounding; granularity -> booleans."""

    @abstractmethod
    def penalty(self, *, step: int) -> Tensor:
        """What is added once to the loss of a step, a scalar."""

    @abstractmethod
    def update(self, *, step: int, skip: Tensor | None) -> None:
        """One step by the gradients that are there, which are used up.

        Args:
            step: number of the step, from 0.
            skip: scalar tensor, nonzero where the step must change nothing (a non-finite loss); read on the device.
        """

    def metrics(self) -> dict[str, Tensor]:
        """Figures of its own, scalars on the device."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What it remembers besides log_alpha."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, bit for bit."""

    @torch.no_grad()
    def _clamp(self) -> None:
        limit = self._settings.log_alpha_limit
        for value in self._log_alpha.values():
            value.clamp_(-limit, limit)
