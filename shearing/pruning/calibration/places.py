"""The matrices of a decoder layer, by name and by what their inputs are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.stored.expert_files import name_in_files
from shearing.models.stored.stored_model import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Place:
    """A place in a decoder layer: modules that read the same there.

    Attributes:
        name: what it is called.
        members: the modules.
        side_by_side: name of all places, this one among them, none of which reads what another one makes.
        expert: its number, of an expert's.
    """

    name: str
    members: tuple[str, ...]
    side_by_side: str
    expert: int | None = None


def places_of(family: Family) -> list[Place]:
    """The linear layers of a decoder layer by what they read, in the order in which one waits for another.

    Of experts those of a layer whose experts are apart (`separate_experts`), what all of them read before what they
    write, though each expert writes before the next one reads (`last_computed`); routers are not among them.
    """
    experts = family.mlp.experts
    if experts is None:
        return named_places(family, "attention read", "attention write", "mlp read", "mlp write")
    matrices = [experts.matrices(expert) for expert in range(experts.count)]
    read = [Place(f"expert {n} read", (gate, up), "mlp read", n) for n, (gate, up, _) in enumerate(matrices)]
    written = [Place(f"expert {n} write", (down,), "mlp write", n) for n, (*_, down) in enumerate(matrices)]
    return [*named_places(family, "attention read", "attention write"), *read, *written]


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
    return [Place(name, members[name], name) for name in names]


def last_computed(places: Sequence[Place]) -> Place:
    """Of places in the order of `places_of`, at least one, that whose inputs a layer comes to last."""
    return max(reversed(places), key=lambda place: -1 if place.expert is None else place.expert)


@dataclass(frozen=True)
class Matrix:
    """A matrix to prune.

    Attributes:
        name: of its weight in the model's files, which is that in its state dict unless it is an expert's.
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


def places_in(source: Source) -> list[Place]:
    """As `places_of`; of a model that no family declares, each linear layer of its first decoder layer by itself."""
    if source.structure is None:
        return places_of(anatomy_of(source.config))
    members = [linear.member for linear in source.structure.linears if linear.block == 0]
    return [Place(member, (member,), member) for member in members]


def num_blocks(source: Source) -> int:
    """Decoder layers; of a model that no family declares, all that it has of blocks with linear layers."""
    blocks: int = source.config.num_hidden_layers if source.structure is None else source.structure.num_blocks
    return blocks


def num_layers(source: Source) -> int:
    """Decoder layers, which a text goes through one after the other; see `num_blocks`."""
    return num_blocks(source) if source.structure is None else source.structure.num_layers


def matrices_of(source: Source) -> list[Matrix]:
    """Every linear layer inside the decoder layers, layer by layer; see `num_blocks`."""
    if source.structure is not None:
        shapes = {linear: source.entries[linear.name].shape for linear in source.structure.linears}
        return [Matrix(linear.name, linear.block, *shape) for linear, shape in shapes.items()]
    return matrices_in(source.config, shapes={name: entry.shape for name, entry in source.entries.items()})


def matrices_in(config: PretrainedConfig, *, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
    """As `matrices_of`, of a model of a declared family whose files have tensors of these names and shapes."""
    family = anatomy_of(config)
    found = []
    for layer in range(config.num_hidden_layers):
        for place in places_of(family):
            for member in place.members:
                name = name_in_files(family, f"{family.layers}.{layer}.{member}.weight")
                rows, columns = shapes[name]
                found.append(Matrix(name, layer, rows, columns))
    return found
