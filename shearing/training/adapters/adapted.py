"""Linear layers whose own weight stays while a change of it is trained, which the plain layer has in the end.

A layer computes x (W + s Δ)ᵀ + bias: W is frozen, Δ is made of few parameters, and s is 1, unless somebody asks what
the change is worth. Nothing of the size of W is kept for the backward pass.

Shapes: O outputs and I inputs of a layer, N tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, linear
from transformers import PreTrainedModel

from shearing.errors import ShearingError

ADAPTER = "default"
"""What peft calls adapters of which there is one."""


class AdaptedLinear(nn.Module):
    """A linear layer of frozen weight and its change; the weight keeps its name.

    Args:
        base: the layer that it takes the place of.
        dropout: share of the change's inputs that is zeroed in training.

    Attributes:
        trained: names of the parameters that the change is made of.
        strength: s.
    """

    trained: ClassVar[tuple[str, ...]]

    def __init__(self, base: nn.Linear, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.strength = 1.0
        self._dropout = dropout

    @property
    def fixed(self) -> tuple[Any, ...]:
        """What `change_of` needs beside weight and parameters: numbers, and tensors that are not trained."""
        return ()

    @staticmethod
    @abstractmethod
    def change_of(weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]) -> Tensor:
        """Δ [O, I], in memory of its own."""

    @staticmethod
    @abstractmethod
    def gradients_of(
        gradient_OI: Tensor, weight_OI: Tensor, trained: Sequence[Tensor], fixed: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """From the gradient of Δ to those of the parameters; the first argument may be overwritten."""

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain layer that computes the same."""
        plain = nn.Linear(self.weight.shape[1], self.weight.shape[0], bias=self.bias is not None, device="meta")
        change_OI = self.change_of(self.weight, [getattr(self, name) for name in self.trained], self.fixed)
        plain.weight = nn.Parameter(self.weight + change_OI.to(self.weight.dtype))
        plain.bias = self.bias
        return plain

    def forward(self, x: Tensor) -> Tensor:
        """X [..., I] to [..., O], in the precision of autocast where there is one."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        trained = [getattr(self, name) for name in self.trained]
        with torch.autocast(x.device.type, enabled=False):
            if self.training and self._dropout > 0.0:
                own = linear(x, self.weight.to(x.dtype))
                y = own + self._product(dropout(x, self._dropout), alone=True, trained=trained)
            else:
                y = self._product(x, alone=False, trained=trained)
            return y if self.bias is None else y + self.bias.to(y.dtype)

    def _product(self, x: Tensor, *, alone: bool, trained: Sequence[Tensor]) -> Tensor:
        return _product(x, self.weight, type(self), self.fixed, self.strength, alone, *trained)


class _Product(torch.autograd.Function):
    """x (W + s Δ)ᵀ, or x (s Δ)ᵀ `alone`, for frozen W; the sum is made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_OI: Tensor,
        kind: type[AdaptedLinear],
        fixed: tuple[Any, ...],
        s: float,
        alone: bool,
        *trained: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI, *trained)
        ctx.kind, ctx.fixed, ctx.s, ctx.alone = kind, fixed, s, alone
        return linear(x_NI, _Product._weight(ctx, weight_OI, trained, dtype=x_NI.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, weight_OI, *trained = ctx.saved_tensors
        grad_x_NI: Tensor | None = None
        of_trained: tuple[Tensor | None, ...] = (None,) * len(trained)
        if ctx.needs_input_grad[0]:
            grad_x_NI = grad_NO @ _Product._weight(ctx, weight_OI, trained, dtype=grad_NO.dtype)
        if any(ctx.needs_input_grad[6:]):
            gradient_OI = grad_NO.flatten(0, -2).t() @ x_NI.flatten(0, -2)
            gradient_OI = gradient_OI.to(trained[0].dtype).mul_(ctx.s)
            of_trained = ctx.kind.gradients_of(gradient_OI, weight_OI, trained, ctx.fixed)
        return grad_x_NI, None, None, None, None, None, *of_trained

    @staticmethod
    def _weight(ctx: Any, weight_OI: Tensor, trained: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        change_OI: Tensor = ctx.kind.change_of(weight_OI, trained, ctx.fixed)
        if ctx.s != 1.0:
            change_OI = change_OI.mul_(ctx.s)
        return (change_OI if ctx.alone else change_OI.add_(weight_OI)).to(dtype)


_product: Callable[..., Tensor] = _Product.apply


def beside_weight(values: Tensor, base: nn.Linear) -> Tensor:
    """Values of a change, where its layer's weight is; as they are beside one that has no place yet."""
    return values if base.weight.is_meta else values.to(base.weight.device)


def linear_layers(model: nn.Module, *, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """Linear layers by name whose names end so.

    Args:
        model: which has them.
        targets: last parts of names.

    Raises:
        ShearingError: there are none of one of the names.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last = {name: name.rpartition(".")[2] for name in linear}
    if unknown := sorted(set(targets) - set(last.values())):
        raise ShearingError(
            "targets",
            value=list(targets),
            allowed=f"names of linear layers: {', '.join(sorted(set(last.values())))}",
            mend=f"remove {', '.join(unknown)}",
        )
    return {name: module for name, module in linear.items() if last[name] in targets}


def put_in_place(model: PreTrainedModel, layers: Iterable[tuple[str, AdaptedLinear]]) -> None:
    """Freeze a model's own weights, and put adapted layers where those of the same names were."""
    model.requires_grad_(False)
    for name, layer in layers:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """Those that are in a model, by name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


def merge_in_place(model: PreTrainedModel, *, masks: Iterable[tuple[str, Tensor]]) -> PreTrainedModel:
    """The plain model with all changes in its weights, and all weights to be trained.

    Args:
        model: changed in place.
        masks: name of a weight and its bool mask, True where kept; checked after merging.

    Raises:
        ShearingError: a weight that a mask drops is not 0.
    """
    for name, layer in list(adapted_layers(model)):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.merged())
    model.requires_grad_(True)
    require_dropped(model, masks=masks)
    return model


def require_dropped(model: nn.Module, *, masks: Iterable[tuple[str, Tensor]]) -> None:
    """Check that what masks drop is 0 in a merged model.

    Raises:
        ShearingError: some is not.
    """
    for name, mask in masks:
        require_dropped_in(name, weight=model.get_parameter(name), mask=mask)


def require_dropped_in(name: str, *, weight: Tensor, mask: Tensor) -> None:
    """As `require_dropped`, of one weight."""
    if (back := int((weight[~mask.to(weight.device)] != 0).sum())) > 0:
        raise ShearingError(
            name,
            value=f"{back} dropped weights are not 0 after merging",
            allowed="adapters made with the masks that are stored with the model",
            mend="make the adapters anew with these masks",
        )
