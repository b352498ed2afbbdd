"""Masks while they are learned, in the order in which a training step uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.models.cutting import compact
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.parameter_budget import ParameterBudget
from shearing.pruning.structured.recipe import PruneRecipe


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

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        stage: PruneRecipe,
        *,
        target: Shape | ParameterBudget,
        tokens_per_step: int,
        seed: int = 0,
        scores: Mapping[str, Tensor] | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Masks on a model, all open or where scores let them start; what a recipe says of them.

        Args:
            model: a Hugging Face causal language model, changed in place until `cut` or `MaskedModel.release`.
            stage: how masks are learned.
            target: shape to reach, or a parameter budget.
            tokens_per_step: of a global batch, in which durations in tokens are counted.
            seed: of the noise.
            scores: of a metric (see `metric_of`), that grade where masks start; None: every unit open.
            device: where masks live; None: where the model is.

        Raises:
            ShearingError: the family is not known, or the target cannot be reached.
        """
        learner = MaskLearner(
            stage.granularities,
            source=Shape.of(model.config),
            target=target,
            settings=MaskSettings.of(stage, tokens_per_step=tokens_per_step, seed=seed),
            scores=scores,
            device=model.device if device is None else device,
        )
        return cls(model=MaskedModel(model), learner=learner, draws=stage.mask_draws)

    def draw(self, *, step: int, sequence: int = 0, of: int = 1) -> None:
        """See `MaskedTraining.draw`; a micro-batch must lie inside one of the shares. Default: the batch in one."""
        self.model.set_masks(self.learner.sample(step=step, draw=sequence * self.draws // of))

    def after_backward(self, *, step: int, scale: float = 1.0) -> None:
        """See `MaskedTraining.after_backward`: the sum over processes, then the penalty, which counts once."""
        self.learner.sum_gradients(scale=scale)
        penalty = self.learner.penalty(step=step)
        if penalty.requires_grad:
            penalty.backward()

    def update(self, *, step: int, skip: Tensor | None = None) -> Tensor:
        """See `MaskedTraining.update`; None: the weights' step was not skipped."""
        gradients = [p.grad for p in self.learner.parameters() if p.grad is not None]
        skip = torch.zeros((), dtype=torch.bool, device=self.learner.device) if skip is None else skip
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

    def expected_parameters(self, *, step: int) -> float:
        """See `MaskLearner.expected_parameters`."""
        return self.learner.expected_parameters(step=step)

    def state_dict(self) -> dict[str, Any]:
        """See `MaskLearner.state_dict`."""
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `MaskLearner.load_state_dict`."""
        self.learner.load_state_dict(state)

    def cut(self) -> PreTrainedModel:
        """A plain, smaller model that computes what this one does under its final masks; takes the masks off it.

        Raises:
            ShearingError: the target is a budget whose result was not made uniform.
        """
        selection, masks = self.learner.selection(), self.learner.final_masks()
        return compact(self.model.release(), masks=masks, selection=selection)
