"""Experts taken apart: each matrix a linear layer of its own, as files have them, for what looks at single matrices.

Legend: T tokens, K experts of a token, D hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SeparateExperts(nn.Module):
    """Experts that compute what those of a stack do, one after the other; each is a module named by its number.

    Args:
        experts: what they are made of; only its shapes and its activation are taken, and no weights.
        gate, up, down: names of an expert's linear layers.
    """

    def __init__(self, experts: nn.Module, *, gate: str, up: str, down: str) -> None:
        stack, activation = experts.down_proj, experts.act_fn
        assert isinstance(stack, Tensor)
        count, width, units = stack.shape
        super().__init__()
        self._gate, self._up, self._down = gate, up, down
        self._apart: list[nn.ModuleDict] = []
        sizes = {gate: (width, units), up: (width, units), down: (units, width)}
        for number in range(count):
            expert = nn.ModuleDict({name: _linear(*of) for name, of in sizes.items()})
            self._apart.append(expert)
            self.add_module(str(number), expert)
        self.act_fn = activation

    def share(self, experts: nn.Module) -> None:
        """Makes the matrices of a stack these experts' own, without copies."""
        gate_up, down = experts.gate_up_proj, experts.down_proj
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        for layers, read, write in zip(self._apart, gate_up.detach(), down.detach(), strict=True):
            gate, up = read.chunk(2)
            for name, weight in ((self._gate, gate), (self._up, up), (self._down, write)):
                layers[name].weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the experts of each token write: [T, D]; one that has no token is called with none."""
        out_TD = torch.zeros_like(x_TD)
        activation = self.act_fn
        assert callable(activation)
        for number, layers in enumerate(self._apart):
            token, place = (index_TK == number).nonzero(as_tuple=True)
            inner = activation(layers[self._gate](x_TD[token])) * layers[self._up](x_TD[token])
            written = layers[self._down](inner) * weights_TK[token, place, None]
            out_TD = out_TD.index_add(0, token, written.to(out_TD.dtype))
        return out_TD


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose weight takes no memory until it is filled."""
    with torch.device("meta"):
        linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(torch.empty(()).expand(outputs, inputs), requires_grad=False)
    return linear


def separate_experts(model: PreTrainedModel, *, share: bool = False) -> None:
    """Takes the experts of a model without weights apart, in place; a model without experts stays as it is.

    Parameters of a layer then are called as in files, but for the name of the MLP (`name_in_files`).

    Args:
        model: changed in place.
        share: it has weights, and keeps them.
    """
    experts = anatomy_of(model.config).mlp.experts
    if experts is None:
        return
    gate, up, down = (matrix.rpartition(".")[2] for matrix in experts.matrices(0))
    for layer in decoder_layers(model):
        together = layer.get_submodule(experts.module)
        apart = SeparateExperts(together, gate=gate, up=up, down=down)
        if share:
            apart.share(together)
        layer.set_submodule(experts.module, apart)
