"""What an estimator does: masks out of log_alpha, and steps of log_alpha."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from shearing.pruning.structured.constraint import Constraint
from shearing.pruning.structured.mask_settings import MaskSettings


class Estimator(ABC):
    """How the masks of a step come out of log_alpha, and how the loss moves log_alpha.

    Args:
        log_alpha: by granularity; what is learned.
        constraint: sizes to reach.
        settings: rates and durations.
        places: by granularity, at a step, each unit's rank in its row less the units to keep, so that the half below 0
            stays: -0.5 is the last that does, 0.5 the first that goes.
    """

    def __init__(
        self,
        log_alpha: Mapping[str, nn.Parameter],
        *,
        constraint: Constraint,
        settings: MaskSettings,
        places: Callable[[int], dict[str, Tensor]],
    ) -> None:
        self._log_alpha, self._constraint, self._settings, self._places = log_alpha, constraint, settings, places
        self.multipliers: nn.Module = nn.Module()

    @abstractmethod
    def masks(self, *, step: int, draw: int) -> dict[str, Tensor]:
        """Masks of one share of a step's batch, differentiable in log_alpha; the same on every process and device."""

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

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What it remembers besides log_alpha."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, bit for bit."""
