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

from shearing.errors import ShearingError, key
from shearing.models.cutting import compact
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.masking.facts import MASKINGS
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
            target: shape to reach, or a parameter budget; see `shape_or_budget`.
            tokens_per_step: of a global batch, in which durations in tokens are counted.
            seed: of the noise.
            scores: of a metric (see `metric_of`), that grade where masks start; None: every unit open.
            device: where masks live; None: where the model is.

        Raises:
            ShearingError: the family is not known, the model is masked already, the target cannot be reached, units
                are to go in another way, or scores lack some of what may be pruned.
        """
        if stage.masks != "learned":
            path, _, name = MASKINGS[stage.masks].home.partition(":")
            raise ShearingError(
                "masks",
                value=stage.masks,
                allowed="learned: the others learn no masks, and are classes of their own",
                mend=f"make {name}(MaskedModel(model), stage.granularities, target=…, settings=stage, "
                f"tokens_per_step=…) of {path}, which takes the same calls, and cut by compact(…) what its selection() "
                "keeps; or use `shear run`",
            )
        learner = MaskLearner(
            stage.granularities,
            source=Shape.of(model.config),
            target=target,
            settings=MaskSettings.of(stage, tokens_per_step=tokens_per_step, seed=seed),
            scores=scores,
            device=model.device if device is None else device,
        )
        return cls(model=MaskedModel(model), learner=learner, draws=stage.mask_draws)

    def require_shares(self, *, sequences: int, micro_batch_size: int) -> None:
        """Check that no micro-batch has rows of two draws.

        Args:
            sequences: of a step's global batch.
            micro_batch_size: sequences per forward pass.

        Raises:
            ShearingError: one has.
        """
        if self.draws == 1 or (sequences % self.draws == 0 and sequences // self.draws % micro_batch_size == 0):
            return
        raise ShearingError(
            "mask_draws",
            value=self.draws,
            allowed=f"1, or a number of equal parts of the batch of {sequences} sequences, each a multiple of the "
            f"micro-batch of {micro_batch_size}",
            mend=f"set {key('mask_draws')}=1, or make micro-batches smaller and more of them",
        )

    def draw(self, *, step: int, sequence: int = 0, of: int = 1) -> None:
        """See `MaskedTraining.draw`; a micro-batch must lie inside one of the shares. Default: the batch in one.

        Raises:
            ShearingError: the batch has no equal shares, as it has none in one forward pass; or the masks were cut.
        """
        if of % self.draws:
            raise ShearingError(
                "mask_draws",
                value=self.draws,
                allowed=f"a number of equal parts of the batch, which is said to have {of} (`of`)",
                mend=f"call draw(step=…, sequence=…, of=…) before each micro-batch, or set {key('mask_draws')}=1",
            )
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

    def settle(self, *, step: int | None = None) -> None:
        """See `MaskedTraining.settle`; without a step the masks that `cut` would cut now, whatever the step."""
        masks = self.learner.final_masks() if step is None else self.learner.masks_at(step=step)
        self.model.set_masks(masks)

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
