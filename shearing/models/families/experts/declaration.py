"""What a family says of its experts: where they and their router are, how they are weighted, how files spell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shearing.models.families.axes import When


@dataclass(frozen=True)
class Spelling:
    """A parameter that files have under other names than a model has, or in several tensors.

    Attributes:
        name: of the parameter, inside a layer.
        parts: its names in files, inside a layer. With `{expert}` in them a tensor is of one expert; several have its
            rows in equal shares, the first ones first.
    """

    name: str
    parts: tuple[str, ...]

    @property
    def by_expert(self) -> bool:
        """Whether each expert has tensors of its own."""
        return "{expert}" in self.parts[0]


@dataclass(frozen=True)
class Experts:
    """The experts of an MLP, which are kept in stacks, and the router that chooses some of them for each token.

    An expert is down(activation(gate(x)) * up(x)); its gate and up projections are one matrix, gates first.

    Attributes:
        router: module that scores all experts of a token; its weight is [E, d].
        module: module that computes them.
        read: stack of what reads, [E, 2 m, d].
        write: stack of what writes, [E, d, m].
        normalises: which configs have the weights of a token's experts add up to one.
        weights_in_fp32: these weights stay fp32; else they get the dtype of the router's product.
        spellings: how files call the parameters: the router's weight, what reads, what writes.
        count: E, of a family as a config has it.
    """

    router: str
    module: str
    read: str
    write: str
    normalises: When
    weights_in_fp32: bool
    spellings: Sequence[Spelling]
    count: int = field(default=0, compare=False)

    def matrices(self, expert: int) -> tuple[str, str, str]:
        """What an expert's gate, up and down projections are called in a layer where each is a module of its own."""
        mlp = self.module.partition(".")[0]
        parts = [part for spelling in self.spellings if spelling.by_expert for part in spelling.parts]
        inside = [part.partition(".")[2].removesuffix(".weight").format(expert=expert) for part in parts]
        gate, up, down = (f"{mlp}.{name}" for name in inside)
        return gate, up, down
