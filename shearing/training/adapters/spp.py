"""Trained factors of weights, so that what is 0 stays 0 (SPP, arXiv 2405.16057).

    W (1 + c R(A) ⊙ b)        A: r rows of factors of the inputs, R repeats each for O / r neighbouring outputs,
                              b: a factor of each output

A starts uniform in ±1/√I and b at 0, so the first forward pass is that of the model as it was. The change is a product
with W itself: merging cannot fill a zero, whatever the masks.

Shapes: O outputs and I inputs of a layer, r rows of factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from shearing.errors import ShearingError, key
from shearing.training.adapters.adapted import AdaptedLinear, beside_weight, linear_layers, put_in_place


class ScaledLinear(AdaptedLinear):
    """A linear layer with factors of its weights.

    Args:
        base: the layer that it takes the place of; r divides its outputs.
        rank: r.
        scale: c.
        dropout: share of the change's inputs that is zeroed in training.
    """

    trained: ClassVar = ("spp_inputs", "spp_outputs")

    def __init__(self, base: nn.Linear, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(base, dropout=dropout)
        bound = 1 / math.sqrt(base.in_features)
        # Drawn on the CPU: the same numbers wherever the model is.
        inputs, outputs = torch.empty(rank, base.in_features).uniform_(-bound, bound), torch.zeros(base.out_features)
        self.spp_inputs, self.spp_outputs = (nn.Parameter(beside_weight(each, base)) for each in (inputs, outputs))
        self._scale = scale

    @property
    @override
    def fixed(self) -> tuple[Any, ...]:
        return (self._scale,)

    @staticmethod
    @override
    def change_of(weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]) -> Tensor:
        (a_rI, b_O), (c,) = trained, fixed
        rank = a_rI.shape[0]
        factors = a_rI[:, None] * b_O.view(rank, -1, 1)
        return factors.view(weight_OI.shape).mul_(c).mul_(weight_OI)

    @staticmethod
    @override
    def gradients_of(
        gradient_OI: Tensor, weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        (a_rI, b_O), (c,) = trained, fixed
        of_factors = gradient_OI.mul_(weight_OI).mul_(c).view(a_rI.shape[0], -1, a_rI.shape[1])
        return (
            torch.einsum("roi,ro->ri", of_factors, b_O.view(a_rI.shape[0], -1)),
            torch.einsum("roi,ri->ro", of_factors, a_rI).flatten(),
        )


def add_factors(
    model: PreTrainedModel, *, rank: int = 16, scale: float = 2.0, dropout: float = 0.0, targets: Sequence[str]
) -> None:
    """Put factors into a model, in place; its own weights are frozen. `adapted.merge_in_place` merges them.

    Args:
        model: dense or sparse.
        rank, scale, dropout: see `ScaledLinear`; the defaults are the released code's, but for its dropout of 0.05.
        targets: last parts of the names of the layers that get them.

    Raises:
        ShearingError: no layer has such a name, or the rank does not divide a layer's outputs.
    """
    layers = linear_layers(model, targets=targets)
    require_rank(rank, outputs=[layer.out_features for layer in layers.values()])
    put_in_place(
        model, ((name, ScaledLinear(layer, rank=rank, scale=scale, dropout=dropout)) for name, layer in layers.items())
    )


def require_rank(rank: int, *, outputs: Iterable[int]) -> None:
    """Check that rows of factors serve the same number of outputs each.

    Args:
        rank: rows.
        outputs: of all layers.

    Raises:
        ShearingError: they do not divide them all.
    """
    common = math.gcd(*outputs)
    if common % rank:
        fitting = [each for each in range(1, common + 1) if common % each == 0]
        raise ShearingError(
            "rank",
            value=rank,
            allowed=f"a divisor of the outputs of every target: {', '.join(map(str, fitting))}",
            mend=f"set {key('rank')}={min(fitting, key=lambda each: abs(each - rank))}",
        )
