"""Weights that stay in their files until an engine takes them: by range, each process what it will hold.

A parameter of a skeleton can know where its weight is stored. Whatever is done to the model in between, as masking its
modules or adding adapters, the parameter stays, and with it its place; `take_places` hands them over.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.files.tensors import Entry, read_header, read_range
from shearing.models.anatomy import anatomy_of
from shearing.models.stored.expert_files import parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLACE = "shearing_place"


@dataclass(eq=False)
class Place:
    """Where the weight of a parameter is.

    Attributes:
        name: of the parameter.
        parts: a file and a tensor in it; several where files have experts one by one: what they hold, one behind the
            other, is the parameter, flattened.
        source: what the model is called.
    """

    name: str
    parts: tuple[tuple[Path, Entry], ...]
    source: str
    _finite: bool = False

    def read(
        self,
        *,
        device: torch.device | str,
        start: int = 0,
        numel: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Elements [numel] of the flattened weight; they leave the host in the dtype in which they are stored.

        Args:
            device: where they are wanted.
            start: position of the first.
            numel: how many; None: all that follow.
            dtype: of the result.

        Raises:
            ShearingError: NaN or infinity among them.
        """
        total = sum(entry.numel for _, entry in self.parts)
        end = total if numel is None else start + numel
        if len(self.parts) == 1:
            whole = self._read_part(0, start, end, device=device).to(dtype)
        else:
            whole, first = torch.empty(end - start, dtype=dtype, device=device), 0
            for number, (_, entry) in enumerate(self.parts):
                begin, stop = max(start, first), min(end, first + entry.numel)
                if begin < stop:
                    values = self._read_part(number, begin - first, stop - first, device=device)
                    whole[begin - start : stop - start].copy_(values)
                first += entry.numel
        self._finite = self._finite or end - start == total
        return whole

    def _read_part(self, number: int, begin: int, end: int, *, device: torch.device | str) -> Tensor:
        path, entry = self.parts[number]
        values = read_range(path, entry, start=begin, numel=end - begin).to(device)
        if not (self._finite or bool(torch.isfinite(values).all())):
            raise not_finite(self.name, source=self.source)
        return values

    def move(self, path: Path, entry: Entry) -> None:
        """The weight is another one from now on."""
        self.parts, self._finite = ((path, entry),), False


def give_places(model: PreTrainedModel, *, files: Iterable[Path], source: str) -> bool:
    """Tell the parameters of a skeleton where their weights are; False where one is not stored as it is.

    Args:
        model: its parameters are changed in place.
        files: safetensors that hold them, as a checkpoint of the model or of its backbone alone.
        source: what the model is called.
    """
    found = {name: (path, entry) for path in files for name, entry in read_header(path)[0].items()}
    prefix = f"{model.base_model_prefix}."
    stored_name = anatomy_of(model).stored_name
    every = [
        (each, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        for each in dict.fromkeys((name, stored_name(name)))
    ]
    places: dict[nn.Parameter, Place] = {}
    for name, parameter in model.named_parameters():
        names = [other for other, tensor in every if tensor is parameter]  # tied, it may be stored as the head alone
        stored = next((each for own in names for each in (own, own.removeprefix(prefix)) if each in found), None)
        if stored is not None and found[stored][1].shape == tuple(parameter.shape):
            places[parameter] = Place(name, (found[stored],), source=source)
            continue
        made_of = [part.name for part in parts_of(model.config, name, shape=tuple(parameter.shape))]
        made_of = [each if each in found else each.removeprefix(prefix) for each in made_of]
        if not all(each in found for each in made_of):
            return False
        parts = tuple(found[each] for each in made_of)
        if sum(entry.numel for _, entry in parts) != parameter.numel():
            return False
        places[parameter] = Place(name, parts, source=source)
    for parameter, place in places.items():
        setattr(parameter, _PLACE, place)
    return True


def place_of(parameter: Tensor) -> Place | None:
    """Where the weight of a parameter is stored; None: it is in memory alone."""
    place: Place | None = getattr(parameter, _PLACE, None)
    return place


def take_places(model: nn.Module) -> dict[Tensor, Place]:
    """Where the weights of parameters are; from now on the parameters themselves do not know it."""
    found: dict[Tensor, Place] = {p: place for p in model.parameters() if (place := place_of(p)) is not None}
    for parameter in found:
        delattr(parameter, _PLACE)
    return found


def move_places(places: Iterable[Place], *, to: Path) -> None:
    """Read what is among the safetensors files of a folder, by the names of parameters, from there from now on."""
    by_name = {place.name: place for place in places}
    for path in sorted(to.glob("*.safetensors")):
        for name, entry in read_header(path)[0].items():
            by_name[name].move(path, entry)


def weight_in(model: nn.Module, name: str) -> Tensor:
    """The weight of a parameter of a model, whether it is in memory or not."""
    parameter = model.get_parameter(name)
    place = place_of(parameter)
    if place is None:
        return parameter
    return place.read(device=parameter.device, dtype=parameter.dtype).view(parameter.shape)


def no_weight(parameter: Tensor, *, device: torch.device) -> Tensor:
    """NaN in the shape of a parameter, which takes no memory; so nothing is computed from it unnoticed."""
    return torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)


def not_finite(name: str, *, source: str) -> ShearingError:
    """The error about a source with NaN or infinity in a parameter."""
    return ShearingError(
        f"source (parameter {name})",
        value=source,
        allowed="finite weights",
        mend="the checkpoint holds NaN or infinity: fetch or convert it again",
    )
