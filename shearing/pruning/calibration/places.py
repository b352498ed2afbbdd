"""The matrices of a decoder layer, by name and by what their inputs are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.stored.stored_model import Source


@dataclass(frozen=True)
class Place:
    """A place in a decoder layer: modules that read the same there."""

    name: str
    members: tuple[str, ...]


def places_of(family: Family) -> list[Place]:
    """The linear layers of a decoder layer by what they read, in the order in which they are computed."""
    return named_places(family, "attention read", "attention write", "mlp read", "mlp write")


def named_places(family: Family, *names: str) -> list[Place]:
    """Places by name.

    Args:
        names: those of `places_of`, and `mlp norm`: the residual stream between attention and MLP.
    """
    members = {
        "attention read": family.attention.readers,
        "attention write": (family.attention.write,),
        "mlp norm": (family.mlp.entry,),
        "mlp read": family.mlp.readers,
        "mlp write": (family.mlp.write,),
    }
    return [Place(name, members[name]) for name in names]


@dataclass(frozen=True)
class Matrix:
    """A matrix to prune.

    Attributes:
        name: of its weight in the model's state dict.
        layer: index of its decoder layer.
        rows, columns: outputs and inputs.
    """

    name: str
    layer: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.rows * self.columns


def weight_of(module: nn.Module, member: str) -> Tensor:
    """Weight [O, I] of a linear layer inside a layer, or [d] of a norm."""
    weight = module.get_submodule(member).weight
    assert isinstance(weight, Tensor)
    return weight


def matrices_of(source: Source) -> list[Matrix]:
    """Every linear layer inside the decoder layers, layer by layer."""
    family = anatomy_of(source.config)
    found = []
    for layer in range(source.config.num_hidden_layers):
        for place in places_of(family):
            for member in place.members:
                name = f"{family.layers}.{layer}.{member}.weight"
                rows, columns = source.entries[name].shape
                found.append(Matrix(name, layer, rows, columns))
    return found
