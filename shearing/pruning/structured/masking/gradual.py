"""One unit of all layers at a time, of whichever kind: EfficientLLM (arXiv 2502.06663), a reconstruction.

Legend: F steps until the masks are fixed; N steps between removals; p see `removal`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.pruning.structured.masking.removal import Removal
from shearing.pruning.structured.recipe import PruneRecipe, removal_steps


class GradualRemoval(Removal):
    """Every N steps the least salient units go, each out of all layers at once, as evenly as F steps allow.

    As published (as far as that is known): units of one kind go out of all layers together; kinds are compared
    directly, by their saliency; it is summed over the N steps since the last removal; pruning takes a share of
    training, ordinary training follows. A guess: the saliency |w g - ½ w² F| of a unit, here |p - ½ p²| of each step,
    with one step's square for F, of the unit as a whole and not of each weight. Ours: kinds compete only for what
    the target still has to lose, so that it is met exactly; several units go at a time where there are fewer steps than
    units; layers are one of the kinds; what remains is not updated by second order, but trained.

    Args:
        model, granularities, target, device: see `Removal`.
        settings: the section of the recipe.
        tokens_per_step: of a global batch.
    """

    def __init__(
        self,
        model: MaskedModel,
        granularities: Sequence[str],
        *,
        target: Shape,
        settings: PruneRecipe,
        tokens_per_step: int,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(model, granularities, target=target, device=device)
        self._steps = removal_steps(settings, tokens_per_step=tokens_per_step)
        self._total = sum(g.units - (g.target or 0) for g in self.granularities)

    def removes(self, step: int) -> bool:
        """See `Removal.removes`."""
        return step + 1 in self._steps

    def measures(self, step: int) -> bool:
        """See `Removal.measures`."""
        return step < self._steps[-1]

    def saliency(self, product: Tensor) -> Tensor:
        """|p - ½ p²|."""
        return (product - 0.5 * product.square()).abs()

    def taken(self, step: int, *, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `Removal.taken`: the least of all kinds, one after the other."""
        done = self._steps.index(step + 1)
        number = self._total * (done + 1) // len(self._steps) - self._total * done // len(self._steps)
        together = torch.cat(list(losses.values()))
        # In the order of the kinds where two are equal; a kind's own losses never fall, so its first ones are taken.
        place = torch.argsort(torch.argsort(together, stable=True))
        parts = (place < number).split([value.numel() for value in losses.values()])
        return {name: part.sum() for name, part in zip(losses, parts, strict=True)}
