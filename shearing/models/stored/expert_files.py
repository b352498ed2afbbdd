"""How files call parameters that a model keeps in one piece: every expert's matrices under names of their own.

That is how these models are published, and what readers other than transformers 5 know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.models.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Place = EllipsisType | tuple[int, slice]


@dataclass(frozen=True)
class Part:
    """A tensor in files that is a parameter, or a part of one.

    Attributes:
        name: in files.
        place: index of the part in the parameter.
    """

    name: str
    place: Place

    def of(self, parameter: Tensor) -> Tensor:
        """The part, a view."""
        return parameter[self.place]


def parts_of(config: PretrainedConfig, name: str, *, shape: tuple[int, ...]) -> Iterator[Part]:
    """The tensors in files that make up a parameter.

    Args:
        config: of the model, of any architecture.
        name: of the parameter in the model's state dict.
        shape: its.
    """
    family = FAMILIES.get(config.model_type)
    experts = None if family is None else family.mlp.experts
    if family is None or experts is None or not name.startswith(f"{family.layers}."):
        yield Part(name, ...)
        return
    layer, inner = name[len(family.layers) + 1 :].split(".", 1)
    spelling = next((spelling for spelling in experts.spellings if spelling.name == inner), None)
    if spelling is None:
        yield Part(name, ...)
        return
    prefix = f"{family.layers}.{layer}."
    if not spelling.by_expert:
        yield Part(prefix + spelling.parts[0], ...)
        return
    rows = shape[1] // len(spelling.parts)
    for expert in range(shape[0]):
        for number, part in enumerate(spelling.parts):
            place = (expert, slice(number * rows, (number + 1) * rows))
            yield Part(prefix + part.format(expert=expert), place)


def name_in_files(family: Family, name: str) -> str:
    """What files call something in a layer whose name ends as it does there: the router, or a matrix of an expert."""
    experts = family.mlp.experts
    if experts is None:
        return name
    written = experts.spellings[0].parts[0].partition(".")[0]
    return name.replace(f".{family.mlp.module}.", f".{written}.")


def whole_masks(model: PreTrainedModel, masks: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Masks of tensors in files as those of parameters; what of a stack has none is kept.

    Args:
        model: whose parameters they are of.
        masks: by name in files, layer after layer; those of a layer's stacks are in memory together.
    """
    config = model.config
    places = {
        part.name: (name, part)
        for name, parameter in model.named_parameters()
        for part in parts_of(config, name, shape=tuple(parameter.shape))
        if part.place is not ...
    }
    layer, stacks = "", dict[str, Tensor]()
    for name, mask in masks:
        if name not in places:
            yield name, mask
            continue
        parameter, part = places[name]
        if parameter.split(".experts.")[0] != layer:
            yield from stacks.items()
            layer, stacks = parameter.split(".experts.")[0], {}
        if parameter not in stacks:
            stacks[parameter] = torch.ones(model.get_parameter(parameter).shape, dtype=torch.bool)
        stacks[parameter][part.place] = mask
    yield from stacks.items()
