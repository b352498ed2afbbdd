"""A model whose weights stay in their files, and that runs as it is before any engine has it.

What is outside of its layers is in memory, a layer's weights are while the layer runs. `stop_paging` ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from shearing.models.anatomy import decoder_layers
from shearing.models.stored.paging.places import Place, move_places, no_weight, place_of, take_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(eq=False)
class Pages:
    """Which weights of a model are in memory.

    Attributes:
        device: where the model runs.
        changes: folder of safetensors files with weights that replace some once an engine takes over; None: none do.
    """

    device: torch.device
    changes: Path | None = None
    _outer: list[nn.Parameter] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def open(self, model: PreTrainedModel) -> None:
        """Let a model run whose parameters know where their weights are.

        Args:
            model: changed in place.

        Raises:
            ShearingError: a weight outside of the layers is not finite.
        """
        layers = decoder_layers(model)
        inside = {id(parameter) for parameter in layers.parameters()}
        self._outer = [parameter for parameter in model.parameters() if id(parameter) not in inside]
        for parameter in self._outer:
            self._fetch(parameter)
        for layer in layers:
            _PAGES[layer] = self
            self._handles += [
                layer.register_forward_pre_hook(self._enter),
                layer.register_forward_hook(self._leave, always_call=True),
            ]

    def close(self) -> None:
        """The model is a skeleton again."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._outer:
            self._let_go(parameter)
        self._handles, self._outer = [], []

    def _enter(self, layer: nn.Module, *_: Any) -> None:
        # Where something stands in for the layer's computation, its weights are not needed.
        if "forward" not in vars(layer):
            self._fetch(*layer.parameters())

    def _leave(self, layer: nn.Module, *_: Any) -> None:
        self._let_go(*layer.parameters())
        torch.clear_autocast_cache()  # it would keep a copy of every weight until a whole pass over text ends

    def _fetch(self, *parameters: nn.Parameter) -> None:
        for parameter in parameters:
            if (place := place_of(parameter)) is not None:
                parameter.data = place.read(device=self.device, dtype=parameter.dtype).view(parameter.shape)

    def _let_go(self, *parameters: nn.Parameter) -> None:
        for parameter in parameters:
            if place_of(parameter) is not None:
                parameter.data = no_weight(parameter, device=self.device)


_PAGES: WeakKeyDictionary[nn.Module, Pages] = WeakKeyDictionary()
"""Of decoder layers of models that are paged."""


def stop_paging(model: nn.Module) -> dict[Tensor, Place]:
    """Make a model that is paged a skeleton for good.

    Args:
        model: itself, or whatever it is a part of.

    Returns:
        Where the weights of its parameters are, those of changed layers where they have been kept; empty where it was
        not paged.
    """
    for pages in {pages for module in model.modules() if (pages := _PAGES.pop(module, None)) is not None}:
        pages.close()
        places = take_places(model)
        if pages.changes is not None:
            move_places(places.values(), to=pages.changes)
        return places
    return {}
