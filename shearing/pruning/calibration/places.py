"""The matrices of a decoder layer, by name and by what their inputs are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.stored_model import Source


def reading_modules(family: Family, *names: str) -> dict[str, str]:
    """Place -> the module of a layer whose input it is."""
    modules = {
        "attention read": readers(family, "attention")[0],
        "attention write": family.attention.write,
        "mlp norm": family.mlp.entry,
        "mlp read": readers(family, "mlp")[0],
        "mlp write": family.mlp.write,
    }
    return {name: modules[name] for name in names}


def readers(family: Family, kind: str) -> list[str]:
    """Names of the linear layers of a sub-layer that read the residual stream, in declaration order."""
    return list(family.sublayers[kind].readers)


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
    """Weight [O, I] of a linear layer inside a layer."""
    weight = module.get_submodule(member).weight
    assert isinstance(weight, Tensor)
    return weight


@dataclass(frozen=True)
class Place:
    """Linear layers that read the same input: names inside a decoder layer."""

    name: str
    members: tuple[str, ...]


def places_of(family: Family) -> list[Place]:
    """The linear layers of a decoder layer by what they read, in the order in which they are computed."""
    return [
        Place("attention read", tuple(readers(family, "attention"))),
        Place("attention write", (family.attention.write,)),
        Place("mlp read", tuple(readers(family, "mlp"))),
        Place("mlp write", (family.mlp.write,)),
    ]


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
