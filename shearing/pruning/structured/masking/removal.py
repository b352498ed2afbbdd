"""Units taken out while weights are trained: by what the training steps' own gradients say of them.

A mask multiplies what its unit writes, so its gradient is dL/dz_u = sum of w g over all weights with which the unit
writes into the residual stream, g their gradients: signed, not the sum of |w g|. For an MLP unit it is the sum over its
rows of `up_proj` too, for a KV group over those of `v_proj`, as what is written is linear in them. It costs no further
pass, is there with every engine, and is summed over the batch and the processes before anything is made of it.

Legend: z binary masks; u units of a row; p = z_u dL/dz_u of one step, the loss that a first-order expansion says goes
with the unit, negated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from shearing.models.cutting import Selection
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import as_masks, granularities_of
from shearing.pruning.structured.learner import OPEN
from shearing.pruning.structured.parameter_budget import count_parameters
from shearing.training.engines.gradient_sum import sum_in_one_exchange


class Removal(ABC):
    """Binary masks from which units go at some steps, the same number in every row; see `MaskedTraining`.

    All decisions are made on the device, from sums that are the same on all processes.

    Args:
        model: where the masks act.
        granularities: names as in a recipe, without `sublayers`, which would have to go in pairs.
        target: shape to reach.
        device: where masks live.

    Raises:
        ShearingError: the target cannot be reached with these granularities.
    """

    def __init__(
        self, model: MaskedModel, granularities: Sequence[str], *, target: Shape, device: torch.device | str = "cpu"
    ) -> None:
        self.model, self.target = model, target
        self.source = Shape.of(model.model.config)
        self.granularities = granularities_of(granularities, source=self.source, target=target)
        self._alive = {g.name: torch.ones(g.size, device=device) for g in self.granularities}
        self._saliency = {name: torch.zeros_like(value) for name, value in self._alive.items()}
        self._drawn: dict[str, Tensor] = {}
        self._step_saliency: dict[str, Tensor] = {}

    # -- what the ways differ in -----------------------------------------------------------------------------------

    @abstractmethod
    def removes(self, step: int) -> bool:
        """Whether units go after this step (steps done before it)."""

    @abstractmethod
    def measures(self, step: int) -> bool:
        """Whether this step's gradients count for the next removal."""

    @abstractmethod
    def saliency(self, product: Tensor) -> Tensor:
        """What one step says of units, of p; never negative."""

    @abstractmethod
    def taken(self, step: int, *, losses: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """How many units of every row go after this step.

        Args:
            step: one that `removes`.
            losses: by granularity, [units of a row]: entry j is the saliency, summed over rows, of the unit of each row
                that would be the (j + 1)-th to go; infinite for those that the target keeps.

        Returns:
            By granularity, scalar on the device.
        """

    # -- a step ----------------------------------------------------------------------------------------------------

    def draw(self, *, step: int, sequence: int, of: int) -> None:
        """See `MaskedTraining.draw`: the same masks for the whole batch."""
        del sequence, of
        if not self._drawn:
            measures = self.measures(step)
            self._drawn = {name: value.clone().requires_grad_(measures) for name, value in self._alive.items()}
        self.model.set_masks(as_masks(self._drawn))

    def after_backward(self, *, step: int, scale: float) -> None:
        """See `MaskedTraining.after_backward`."""
        drawn, self._drawn = self._drawn, {}
        self._step_saliency = {}
        if self.measures(step):
            sum_in_one_exchange(list(drawn.values()), scale=scale)
            self._step_saliency = {
                name: value.grad * self._alive[name] for name, value in drawn.items() if value.grad is not None
            }

    @torch.no_grad()
    def update(self, *, step: int, skip: Tensor) -> Tensor:
        """See `MaskedTraining.update`: note what the step says, then take out what goes."""
        products, self._step_saliency = self._step_saliency, {}
        if products:
            skip = skip | ~get_total_norm(list(products.values())).isfinite()
        for name, product in products.items():
            self._saliency[name] = torch.where(
                skip, self._saliency[name], self._saliency[name] + self.saliency(product)
            )
        if self.removes(step):
            self._remove(step)
        return skip

    def _remove(self, step: int) -> None:
        ranked = {name: _ranked(self._saliency[name], alive=alive) for name, alive in self._alive.items()}
        losses = {
            g.name: _losses(self._saliency[g.name], ranked[g.name], alive=self._alive[g.name], keep=g.target or 0)
            for g in self.granularities
        }
        for name, number in self.taken(step, losses=losses).items():
            kept = self._alive[name].sum(-1, keepdim=True) - number
            self._alive[name] = (ranked[name] < kept).to(torch.float32)
        self._saliency = {name: torch.zeros_like(value) for name, value in self._saliency.items()}

    # -- what there is ---------------------------------------------------------------------------------------------

    def settle(self, *, step: int) -> None:
        """See `MaskedTraining.settle`: the masks are binary, and of the size of their step."""
        del step
        self.model.set_masks(self.final_masks())

    def settled_parameters(self, *, step: int) -> int:
        """See `MaskedTraining.settled_parameters`."""
        return int(self.expected_parameters(step=step))

    @torch.no_grad()
    def expected_parameters(self, *, step: int) -> float:
        """See `MaskedTraining.expected_parameters`."""
        del step
        alive = {name: value.double() for name, value in self._alive.items()}
        return float(count_parameters(alive, source=self.source)) if alive else float(self.source.num_parameters())

    def metrics(self, *, step: int) -> dict[str, Tensor]:
        """See `MaskedTraining.metrics`: units of a row that are left."""
        del step
        return {f"expected/{name}": value.sum(-1).mean() for name, value in self._alive.items()}

    def final_masks(self) -> Masks:
        """The masks as they are now; in the end, at exactly the target shape."""
        return as_masks(self._alive)

    def selection(self) -> Selection:
        """The units that are left at the end.

        Raises:
            ShearingError: it is not the end yet.
        """
        return Selection.of(self.final_masks(), source=self.source, target=self.target)

    def summary(self) -> dict[str, Any]:
        """What is left, by granularity, as `MaskLearner.summary` says it; no unit was chosen before training began."""
        return {
            g.name: {
                "units": g.units,
                "expected": (kept := float(self._alive[g.name].sum(-1).mean())),
                "target": g.target,
                "kept": kept,
                "largest_violation": float((self._alive[g.name].mean(-1) - (g.target or 0) / g.units).abs().max()),
                "changed_from_start": OPEN,
                "ever_in_doubt": self._alive[g.name].numel(),
                "rounding_gap": 0,
                "total_units": self._alive[g.name].numel(),
            }
            for g in self.granularities
        }

    def parameter_counts(self) -> dict[str, int]:
        """See `MaskLearner.parameter_counts`; nothing is rounded."""
        return dict.fromkeys(("learned", "kept"), self.settled_parameters(step=0))

    def state_dict(self) -> dict[str, Any]:
        """Masks, and what the steps since the last removal say."""
        return {"alive": dict(self._alive), "saliency": dict(self._saliency)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, bit for bit."""
        for kept, held in (("alive", self._alive), ("saliency", self._saliency)):
            for name, value in state[kept].items():
                held[name] = value.to(held[name].device)


def _ranked(saliency: Tensor, *, alive: Tensor) -> Tensor:
    """Rank of each unit in its row from 0, the best; of equals the lower index is better, and those that went last."""
    order = torch.argsort(saliency.masked_fill(alive == 0, -1.0), dim=-1, descending=True, stable=True)
    return torch.argsort(order, dim=-1).to(torch.float32)


def _losses(saliency: Tensor, ranked: Tensor, *, alive: Tensor, keep: int) -> Tensor:
    """See `Removal.taken`."""
    units = saliency.shape[-1]
    rows = saliency.reshape(-1, units)
    by_rank = torch.zeros_like(rows).scatter_(-1, ranked.reshape(-1, units).long(), rows).sum(0)
    left = alive.reshape(-1, units)[0].sum()
    going = torch.arange(units, device=saliency.device)
    place = left - 1 - going
    return torch.where(place >= keep, by_rank[place.clamp(min=0).long()], float("inf"))
