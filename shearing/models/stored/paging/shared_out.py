"""A model that is run and not trained, its decoder layers shared out among the processes (`fully_shard`, FSDP2).

It goes beside any engine, and is no part of it. Of each matrix a process has some rows; a layer is whole while it runs,
from what all processes have of it. So all of them run it, equally often; where they would not, `passes_of_all` sees to
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from shearing.models.anatomy import backbone, decoder_layers
from shearing.models.stored.paging.paged import stop_paging
from shearing.models.stored.paging.places import Place
from shearing.processes.processes import Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def share_out_layers(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype, processes: Processes) -> None:
    """Share out the weights of decoder layers; what is outside of them (embedding, final norm, head) each process has.

    Args:
        model: frozen and changed in place. Weights that are in files (see `models.stored.paging.paged`) are read from
            there, of layers only the own rows; others have to be in memory on every process.
        device: where it is to run.
        dtype: of its weights from now on, and so of its products.
        processes: those of the run, all of which call this.

    Raises:
        ShearingError: see `Place.read`.
    """
    processes.require_group(device)
    everyone = dist.group.WORLD
    assert everyone is not None
    mesh = DeviceMesh.from_group(everyone, device.type)
    model.requires_grad_(False)
    model.config.dtype = dtype
    places, layers = stop_paging(model), decoder_layers(model)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    processes.each(lambda: _fill(outside, places=places, device=device, dtype=dtype))
    for layer in layers:
        stored = {name: places.get(parameter) for name, parameter in layer.named_parameters()}
        for parameter in layer.parameters():
            # What is in a file is read once it is cut up: until then there is room for it.
            room = torch.empty(parameter.shape, dtype=dtype, device=device) if parameter in places else parameter.data
            parameter.data = room.to(device, dtype)
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        cut = {place: parameter for name, parameter in layer.named_parameters() if (place := stored[name]) is not None}
        processes.each(lambda cut=cut: _fill_own(cut, rank=processes.rank, size=processes.size))  # type: ignore[misc]
    # One that has no weights itself, under which layers know of each other.
    fully_shard(backbone(model), mesh=mesh, ignored_params=set(outside))
    _SHARED.add(model)


@contextmanager
def passes_of_all(model: nn.Module, *, processes: Processes) -> Iterator[None]:
    """Inside, every process passes text of its own through a model, as often as it likes and with a cache or without.

    A pass waits until every process makes one. Who has none left takes part with a single token until nobody has, so
    nothing else that processes do together may happen inside.

    Args:
        model: whose layers are shared out; any other, of whatever architecture, is left alone.
        processes: those that have it, all of which call this.
    """
    if model not in _SHARED:
        yield
        return
    body = backbone(model)  # type: ignore[arg-type]

    def somebody(passes: bool) -> bool:
        work, largest = processes.largest(int(passes))
        work.wait()
        return bool(largest)

    def wait_for_all(*_: Any) -> None:
        somebody(True)

    handle = body.register_forward_pre_hook(wait_for_all, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    device = next(body.parameters()).device
    with torch.no_grad():
        while somebody(False):
            body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)


_SHARED: WeakSet[nn.Module] = WeakSet()
"""Models whose layers are shared out."""


def _fill(parameters: list[Any], *, places: dict[Tensor, Place], device: torch.device, dtype: torch.dtype) -> None:
    for parameter in parameters:
        place = places.get(parameter)
        if place is None:
            parameter.data = parameter.data.to(device, dtype)
        else:
            parameter.data = place.read(device=device, dtype=dtype).view(parameter.shape)


@torch.no_grad()
def _fill_own(cut: dict[Place, Any], *, rank: int, size: int) -> None:
    """Fill a process's rows of parameters that are cut up along their first dimension."""
    for place, parameter in cut.items():
        own, rows = parameter.to_local(), parameter.shape[0]
        if own.numel():
            start = rank * -(-rows // size) * (parameter.numel() // rows)
            values = place.read(start=start, numel=own.numel(), device=own.device, dtype=own.dtype)
            own.copy_(values.view(own.shape))
