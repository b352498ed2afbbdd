"""The adapters of each decoder layer, whatever their kind: what a step trains of them, and what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from shearing.models.anatomy import decoder_layers
from shearing.training.adapters.adapted import ADAPTER, AdaptedLinear


@dataclass(frozen=True)
class LayerAdapters:
    """Those of one decoder layer.

    Attributes:
        layer: its index.
        parameters: that are trained.
        modules: that have a strength.
    """

    layer: int
    parameters: tuple[nn.Parameter, ...]
    modules: tuple[Any, ...]

    def train(self, trained: bool) -> None:
        """Whether the next step trains them."""
        for parameter in self.parameters:
            parameter.requires_grad_(trained)


def adapters_by_layer(model: PreTrainedModel) -> list[LayerAdapters]:
    """Of every layer that has some; all of them are trained by now."""
    found = []
    for index, layer in enumerate(decoder_layers(model)):
        parameters = tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)
        modules = tuple(module for module in layer.modules() if _is_adapter(module))
        if parameters:
            found.append(LayerAdapters(index, parameters, modules))
    return found


@contextmanager
def weakened(layers: Iterable[LayerAdapters], *, strength: float) -> Iterator[None]:
    """While it lasts, the changes that the adapters of some layers make are multiplied by `strength`."""
    modules = [module for layer in layers for module in layer.modules]
    _set(modules, strength=strength)
    try:
        yield
    finally:
        _set(modules, strength=1.0)


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(module, AdaptedLinear) or hasattr(module, "lora_A")


def _set(modules: Sequence[Any], *, strength: float) -> None:
    for module in modules:
        if isinstance(module, AdaptedLinear):
            module.strength = strength
        else:  # peft's
            module.set_scale(ADAPTER, strength)
