"""Passing text through a model: what its layers are called with, and several batches through one layer after the other.

Legend: B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.models.anatomy import anatomy_of, backbone, decoder_layers
from shearing.models.stored.paging.on_demand import is_on_demand, largest_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Call:
    """Arguments of a decoder layer's call, but for the residual stream."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class Reached(Exception):  # noqa: N818 - no error: it ends a forward pass where the rest is not needed
    """Raised by what listens, caught by who started the pass."""


@torch.no_grad()
def layer_calls(model: PreTrainedModel, **inputs: Any) -> tuple[Tensor, list[Call]]:
    """What every decoder layer is called with; no layer is computed, so their weights need not be there.

    Args:
        model: its layers and final norm may be without weights, its embedding too where `inputs` are embeddings.
        inputs: keywords of the backbone's call.

    Returns:
        The residual stream [B, S, d] that the first layer reads, and one call for each layer. Calls depend on the shape
        and the documents of the inputs alone, and differ between layers where some attend through a window.
    """
    return embedded(model, **inputs)


def embedded(model: PreTrainedModel, **inputs: Any) -> tuple[Tensor, list[Call]]:
    """As `layer_calls`, but the residual stream has a gradient where gradients are on."""
    streams: list[Tensor] = []
    calls: list[Call] = []

    def record(stream: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        streams.append(stream)
        calls.append(Call(arguments, keywords))
        return stream

    def stop(*_: Any) -> None:
        raise Reached

    family = anatomy_of(model.config)
    layers = decoder_layers(model)
    # Before all that listen there: what comes now is no output of the last layer.
    handle = model.get_submodule(family.final_norm.name).register_forward_pre_hook(stop, prepend=True)
    try:
        model.set_submodule(family.layers, nn.ModuleList(_StandIn(layer, record) for layer in layers))
        # What records must not be compiled into the layers.
        with torch.compiler.set_stance("force_eager"), suppress(Reached):
            backbone(model)(**inputs)
    finally:
        handle.remove()
        model.set_submodule(family.layers, layers)
    return streams[0], calls


class _StandIn(nn.Module):
    """Is called in a layer's place, and else is as the layer; who listens to the layer does not hear of it."""

    def __init__(self, layer: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.__dict__["stands_in_for"], self.__dict__["function"] = layer, function  # no module of its own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_in_for"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        called: Tensor = self.__dict__["function"](*arguments, **keywords)
        return called


def last_states(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> Iterator[Tensor]:
    """Hidden states [B, S, d] after the final norm of one batch after the other.

    Where weights come on demand, batches go through each layer together, as many at a time as have residual streams no
    larger than the model's largest weight; every layer is then read once for all of them.

    Args:
        model: masked or not.
        batches: keywords of the backbone's call for each.
    """
    if not is_on_demand(model):
        for keywords in batches:
            yield backbone(model)(**keywords).last_hidden_state
        return
    room = largest_tensor(model)
    group: list[tuple[Tensor, list[Call]]] = []
    for keywords in batches:
        group.append(layer_calls(model, **keywords))
        if (len(group) + 1) * 4 * group[-1][0].numel() > room:
            yield from _through_layers(model, group)
            group = []
    yield from _through_layers(model, group)


def _through_layers(model: PreTrainedModel, group: list[tuple[Tensor, list[Call]]]) -> Iterator[Tensor]:
    streams, calls = [stream for stream, _ in group], [of_batch for _, of_batch in group]
    for index, layer in enumerate(decoder_layers(model)):
        for number, of_batch in enumerate(calls):
            call = of_batch[index]
            output = layer(streams[number], *call.arguments, **call.keywords)
            streams[number] = output[0] if isinstance(output, tuple) else output
    norm = model.get_submodule(anatomy_of(model.config).final_norm.name)
    while streams:
        yield norm(streams.pop(0))
