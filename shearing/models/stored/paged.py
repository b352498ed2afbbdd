"""Weights that stay in their files: read by range into whatever holds them, or a layer at a time while a model runs.

A parameter of a skeleton can know where its weight is stored. So the model runs as it is: what is outside of its layers
is in memory, a layer's weights are while the layer runs. And an engine that takes it over (`stop_paging`) reads of each
weight what its process holds: no process ever has the whole.

Whoever looks at weights, and not only at what is computed, goes through the layers by `layers_in_turn`, takes one
weight by `weight_in`, or asks for everything by `all_at_once`.

A parameter whose weight is not in memory holds NaN, so that nothing is computed from it unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.files.tensors import Entry, read_header, read_range, write_tensors
from shearing.models.anatomy import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STORED = "shearing_stored"


@dataclass(eq=False)
class Stored:
    """Where the weight of a parameter is.

    Attributes:
        name: of the parameter.
        path: the file.
        entry: of the tensor in it.
        pages: those of its model.
    """

    name: str
    path: Path
    entry: Entry
    pages: Pages
    _finite: bool = False

    def read(
        self,
        *,
        start: int = 0,
        numel: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Elements [numel] of the flattened weight; it leaves the host in the dtype in which it is stored.

        Args:
            start: position of the first.
            numel: how many; None: all that follow.
            device: where they are wanted; None: where the model runs.
            dtype: of the result.

        Raises:
            ShearingError: NaN or infinity among them.
        """
        values = read_range(self.path, self.entry, start=start, numel=numel)
        values = values.to(device or self.pages.device)
        if not self._finite:
            if not bool(torch.isfinite(values).all()):
                raise not_finite(self.name, source=self.pages.source)
            self._finite = values.numel() == self.entry.numel
        return values.to(dtype)

    def move(self, path: Path, entry: Entry) -> None:
        """The weight is another one from now on."""
        self.path, self.entry, self._finite = path, entry, False


@dataclass(eq=False)
class Pages:
    """The stored weights of one model.

    Attributes:
        source: what the model is called.
        device: where it runs.
        changes: folder for layers that are changed; None: none are to be kept.
        keeps: whether this process writes them.
    """

    source: str
    device: torch.device
    changes: Path | None = None
    keeps: bool = True
    _stored: dict[str, Stored] = field(default_factory=dict)
    _outer: list[nn.Parameter] = field(default_factory=list)
    _held: set[nn.Module] = field(default_factory=set)
    _handles: list[Any] = field(default_factory=list)

    def open(self, model: PreTrainedModel, places: Mapping[str, tuple[Path, Entry]]) -> None:
        """Let the model, a skeleton, run.

        Args:
            model: changed in place.
            places: file and entry of each of its parameters.

        Raises:
            ShearingError: a weight outside of the layers is not finite.
        """
        for name, parameter in model.named_parameters():
            stored = Stored(name, *places[name], pages=self)
            self._stored[name] = stored
            setattr(parameter, _STORED, stored)
        inside = {id(parameter) for parameter in decoder_layers(model).parameters()}
        self._outer = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        for parameter in self._outer:
            _fetch(parameter)
        for layer in decoder_layers(model):
            self._handles += [
                layer.register_forward_pre_hook(self._enter),
                layer.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self) -> None:
        """The model is a skeleton again; weights that were changed are read from where they have been kept."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._outer:
            _let_go(parameter)
        self._handles, self._outer = [], []
        for path in sorted(self.changes.glob("*.safetensors")) if self.changes is not None else ():
            for name, entry in read_header(path)[0].items():
                self._stored[name].move(path, entry)

    @contextmanager
    def holding(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """The weights of these layers are in memory for as long as the context lasts."""
        fetched = [layer for layer in layers if layer not in self._held]
        try:
            for layer in fetched:
                self._held.add(layer)
                for parameter in layer.parameters():
                    _fetch(parameter)
            yield
        finally:
            for layer in fetched:
                self._held.discard(layer)
                for parameter in layer.parameters():
                    _let_go(parameter)

    def keep(self, layer: nn.Module, *, index: int) -> None:
        """Write a layer, whose weights are in memory and have been changed; they are read again after `close`."""
        if self.changes is None or not self.keeps:
            return
        stored = [(stored_of(parameter), parameter) for parameter in layer.parameters()]
        weights = {place.name: parameter.detach().cpu() for place, parameter in stored if place is not None}
        self.changes.mkdir(parents=True, exist_ok=True)
        write_tensors(self.changes / f"layer-{index:05d}.safetensors", weights)

    def _enter(self, layer: nn.Module, *_: Any) -> None:
        # Where something stands in for the layer's computation, its weights are not needed.
        if layer in self._held or "forward" in vars(layer):
            return
        for parameter in layer.parameters():
            _fetch(parameter)

    def _leave(self, layer: nn.Module, *_: Any) -> None:
        if layer not in self._held:
            for parameter in layer.parameters():
                _let_go(parameter)


def stored_of(parameter: Tensor) -> Stored | None:
    """Where the weight of a parameter is stored; None: it is in memory alone."""
    stored: Stored | None = getattr(parameter, _STORED, None)
    return stored


def places_of(model: PreTrainedModel, *, files: Iterable[Path]) -> dict[str, tuple[Path, Entry]] | None:
    """File and entry of each parameter of a model.

    Args:
        model: with or without weights.
        files: that hold them, as a checkpoint of the model or of its backbone alone.

    Returns:
        None where a parameter is not stored as it is, but made of what is.
    """
    found = {name: (path, entry) for path in files for name, entry in read_header(path)[0].items()}
    prefix = f"{model.base_model_prefix}."
    places: dict[str, tuple[Path, Entry]] = {}
    for name, parameter in model.named_parameters():
        # Tied, it may be stored as the head alone.
        names = [other for other, tensor in model.named_parameters(remove_duplicate=False) if tensor is parameter]
        stored = next((each for own in names for each in (own, own.removeprefix(prefix)) if each in found), None)
        if stored is None or found[stored][1].shape != tuple(parameter.shape):
            return None
        places[name] = found[stored]
    return places


def layers_in_turn(model: PreTrainedModel, *, changing: bool = False) -> Iterator[nn.Module]:
    """The decoder layers, first to last; of a model that is paged, one layer's weights are in memory until the next.

    Args:
        model: of any kind.
        changing: whether weights are changed in place, and the changes are to stay.
    """
    for index, layer in enumerate(decoder_layers(model)):
        pages = _pages_of(layer)
        if pages is None:
            yield layer
            continue
        with pages.holding([layer]):
            yield layer
            if changing:
                pages.keep(layer, index=index)


@contextmanager
def all_at_once(model: PreTrainedModel) -> Iterator[None]:
    """All weights of a model are in memory for as long as the context lasts, whether it is paged or not."""
    pages = _pages_of(model)
    if pages is None:
        yield
    else:
        with pages.holding(decoder_layers(model)):
            yield


def weight_in(model: nn.Module, name: str) -> Tensor:
    """The weight of a parameter of a model, whether it is in memory or not."""
    parameter = model.get_parameter(name)
    stored = stored_of(parameter)
    return parameter if stored is None else stored.read(dtype=parameter.dtype).view(parameter.shape)


def stop_paging(model: nn.Module) -> dict[Tensor, Stored]:
    """Make a model that is paged a skeleton for good; returns where the weights of its parameters are, if it was one.

    Args:
        model: itself, or whatever it is a part of.
    """
    pages = _pages_of(model)
    if pages is None:
        return {}
    pages.close()
    found: dict[Tensor, Stored] = {
        parameter: stored for parameter in model.parameters() if (stored := stored_of(parameter)) is not None
    }
    for parameter in found:
        delattr(parameter, _STORED)
    return found


def no_weight(parameter: Tensor, *, device: torch.device) -> Tensor:
    """NaN in the shape of a parameter, which takes no memory."""
    return torch.full((), float("nan"), dtype=parameter.dtype, device=device).expand(parameter.shape)


def not_finite(name: str, *, source: str) -> ShearingError:
    """The error about a source with NaN or infinity in a parameter."""
    return ShearingError(
        f"source (parameter {name})",
        value=source,
        allowed="finite weights",
        mend="the checkpoint holds NaN or infinity: fetch or convert it again",
    )


def _pages_of(module: nn.Module) -> Pages | None:
    return next((stored.pages for p in module.parameters() if (stored := stored_of(p)) is not None), None)


def _fetch(parameter: nn.Parameter) -> None:
    stored = stored_of(parameter)
    if stored is not None:
        parameter.data = stored.read(dtype=parameter.dtype).view(parameter.shape)


def _let_go(parameter: nn.Parameter) -> None:
    stored = stored_of(parameter)
    if stored is not None:
        parameter.data = no_weight(parameter, device=stored.pages.device)
