"""Masks while they are learned, in the order in which a training step uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

from shearing.models.masked import MaskedModel
from shearing.pruning.structured.learner import MaskLearner


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The masks of mask learning, as any training loop drives them; see `MaskedTraining` for the order of the calls.

    Attributes:
        model: where the masks act.
        learner: what learns them.
        draws: equal shares of a step's global batch that see one draw of the masks each.
    """

    model: MaskedModel
    learner: MaskLearner
    draws: int

    def draw(self, *, step: int, sequence: int, of: int) -> None:
        """See `MaskedTraining.draw`; a micro-batch must lie inside one of the shares."""
        self.model.set_masks(self.learner.sample(step=step, draw=sequence * self.draws // of))

    def after_backward(self, *, step: int, scale: float) -> None:
        """See `MaskedTraining.after_backward`: the sum over processes, then the penalty, which counts once."""
        self.learner.sum_gradients(scale=scale)
        penalty = self.learner.penalty(step=step)
        if penalty.requires_grad:
            penalty.backward()

    def update(self, *, step: int, skip: Tensor) -> Tensor:
        """See `MaskedTraining.update`."""
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        if gradients:
            skip = skip | ~get_total_norm(gradients).isfinite()
        self.learner.optimizer_step(step=step, skip=skip)
        return skip

    def settle(self, *, step: int) -> None:
        """See `MaskedTraining.settle`."""
        self.model.set_masks(self.learner.masks_at(step=step))

    def settled_parameters(self, *, step: int) -> int:
        """See `MaskLearner.parameters_at`."""
        return self.learner.parameters_at(step=step)

    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """See `MaskLearner.metrics`."""
        return self.learner.metrics(step=step)

    def expected_parameters(self) -> float:
        """See `MaskLearner.expected_parameters`."""
        return self.learner.expected_parameters()

    def state_dict(self) -> dict[str, Any]:
        """See `MaskLearner.state_dict`."""
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `MaskLearner.load_state_dict`."""
        self.learner.load_state_dict(state)
