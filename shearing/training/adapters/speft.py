"""Trained changes of few chosen weights (SPEFT, arXiv 2412.13488): which weights, and the layers that train them.

On a sparse model weights are chosen among those that are kept, so that merging cannot fill a zero.

Shapes: O outputs and I inputs of a matrix, K chosen weights of it, U units (weights, rows or columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shearing.files.tensors import read_header, read_tensors, write_tensors
from shearing.training.adapters.adapted import AdaptedLinear, beside_weight, linear_layers, put_in_place
from shearing.training.adapters.recipe import SalienceName, UnitName


class DeltaLinear(AdaptedLinear):
    """A linear layer some of whose weights have a trained change.

    Args:
        base: the layer that it takes the place of.
        chosen: int64 [K], positions in the flattened weight, none twice.
    """

    trained: ClassVar = ("speft_deltas",)
    chosen: Tensor

    def __init__(self, base: nn.Linear, *, chosen: Tensor) -> None:
        super().__init__(base)
        self.register_buffer("chosen", beside_weight(chosen, base), persistent=False)
        self.speft_deltas = nn.Parameter(beside_weight(torch.zeros(len(chosen)), base))

    @property
    @override
    def fixed(self) -> tuple[Any, ...]:
        return (self.chosen,)

    @staticmethod
    @override
    def change_of(weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]) -> Tensor:
        (deltas_K,), (chosen_K,) = trained, fixed
        change = torch.zeros(weight_OI.numel(), dtype=deltas_K.dtype, device=deltas_K.device)
        change[chosen_K] = deltas_K
        return change.view(weight_OI.shape)

    @staticmethod
    @override
    def gradients_of(
        gradient_OI: Tensor, weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        return (gradient_OI.flatten()[fixed[0]],)


def saliences(
    weights: Mapping[str, Tensor], *, losses: Iterable[Callable[[], tuple[Tensor, Tensor]]], kind: SalienceName
) -> dict[str, Tensor]:
    """How much each weight matters, [O, I] fp32 by name.

    Args:
        weights: of a model, by name.
        losses: of text, each computed when it is called: the sum over its tokens, and how many of them count. Of one
            sequence for `fisher`, of any number else.
        kind: gradient |g|, snip |w g|, with g the gradient of the mean over all tokens; fisher the mean over sequences
            of g², with g that of a sequence's mean; magnitude |w|, of no text.
    """
    if kind == "magnitude":
        return {name: weight.detach().abs().float() for name, weight in weights.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    count: Tensor | int = 0
    for loss in losses:
        total, labels = loss()
        total, counts = (total / labels.clamp(min=1), 1) if kind == "fisher" else (total, labels)
        count = count + counts
        for name, gradient in zip(weights, torch.autograd.grad(total, list(weights.values())), strict=True):
            sums[name] += gradient.float().square() if kind == "fisher" else gradient
    for name, total in sums.items():
        total.div_(max(1, int(count))).abs_()
        if kind == "snip":
            total.mul_(weights[name].detach().abs())
    return sums


def choose(
    scores: Mapping[str, Tensor],
    *,
    kept: Callable[[str], Tensor | None],
    share: float,
    unit: UnitName = "weight",
    among_all: bool = False,
) -> dict[str, Tensor]:
    """Positions of the most salient weights in each flattened matrix, ascending; matrices without any are left out.

    Units are taken from the highest mean score of their kept weights down, as many as have room in the share; at least
    one. Ties go to the first.

    Args:
        scores: of each weight, [O, I] by matrix.
        kept: mask of a matrix, True where kept; None: all of it.
        share: of the kept weights.
        unit: weight, row (an output) or column (an input).
        among_all: whether the share is of all matrices together.
    """
    together = [list(scores)] if among_all else [[name] for name in scores]
    chosen: dict[str, Tensor] = {}
    for names in together:
        # Several times the size of the scores: of one matrix after the other, where that will do.
        masks = {name: _mask(kept(name), like=scores[name]) for name in names}
        of_units: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            sizes_U = _by_unit(masks[name].long(), unit=unit)
            means_U = _by_unit(scores[name].float() * masks[name], unit=unit) / sizes_U.clamp(min=1)
            of_units[name] = (means_U.masked_fill(sizes_U == 0, float("-inf")), sizes_U)
        means_U, sizes_U = (torch.cat([of_units[name][kind] for name in names]) for kind in (0, 1))
        taken = _taken(means_U, sizes_U, share=share)
        for name, of_matrix in zip(names, taken.split([len(of_units[name][0]) for name in names]), strict=True):
            weights_OI = _to_weights(of_matrix, unit=unit, like=masks[name]) & masks[name]
            if len(found := weights_OI.flatten().nonzero()[:, 0]):
                chosen[name] = found
    return chosen


def _mask(mask: Tensor | None, *, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.to(like.device)


def _by_unit(values_OI: Tensor, *, unit: UnitName) -> Tensor:
    return values_OI.flatten() if unit == "weight" else values_OI.sum(1 if unit == "row" else 0)


def _to_weights(taken_U: Tensor, *, unit: UnitName, like: Tensor) -> Tensor:
    shape = {"weight": like.shape, "row": (-1, 1), "column": (1, -1)}[unit]
    return taken_U.view(shape).expand(like.shape)


def _taken(means_U: Tensor, sizes_U: Tensor, *, share: float) -> Tensor:
    order = means_U.sort(descending=True, stable=True).indices
    room = share * float(sizes_U.sum())
    fits = sizes_U[order].cumsum(0) <= room
    fits[0] = True
    return torch.zeros_like(fits).scatter_(0, order, fits & (sizes_U[order] > 0))


def write_chosen(path: Path, chosen: Mapping[str, Tensor]) -> None:
    """Keep what was chosen, by name of the weight."""
    write_tensors(path, {name: positions.cpu() for name, positions in chosen.items()})


def read_chosen(path: Path) -> dict[str, Tensor]:
    """What `write_chosen` was given."""
    return read_tensors(path, list(read_header(path)[0]))


def add_deltas(model: PreTrainedModel, *, chosen: Mapping[str, Tensor]) -> None:
    """Let some weights of a model be changed, in place; all its own are frozen. `adapted.merge_in_place` merges them.

    Args:
        model: dense or sparse.
        chosen: positions in the flattened weight, by name of the weight, see `choose`.

    Raises:
        ShearingError: there is no linear layer of such a name.
    """
    targets = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in chosen})
    layers = linear_layers(model, targets=targets)
    names = [name.removesuffix(".weight") for name in chosen]
    put_in_place(model, ((name, DeltaLinear(layers[name], chosen=chosen[f"{name}.weight"])) for name in names))
