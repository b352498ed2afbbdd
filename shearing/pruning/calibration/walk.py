"""Walking a model layer by layer: what the parts of a layer read, and where a pass may end early.

Legend: B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.stored.paging.passing import Call, Reached, layer_calls as layer_calls
from shearing.pruning.calibration.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MISTAKEN = (AttributeError, IndexError, TypeError, ValueError)
"""What a model raises when its layers put out a tensor where it wants a tuple."""


def run_layer(
    forward: Callable[..., Any],
    layer: nn.Module,
    stream: Tensor,
    call: Call,
    *,
    places: Sequence[Place],
    until: str | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """One layer on a residual stream [B, S, d].

    Args:
        forward: the layer itself, or its `forward`, which a compiled or checkpointed layer needs: what listens here
            must not be compiled in.
        places: whose inputs are wanted.
        until: name of the place whose input ends the pass.

    Returns:
        The inputs of the places by name, and the residual stream after the layer, or before it if the pass ended early.
    """
    with listening(layer, places, until=until) as seen:
        try:
            output = forward(stream, *call.arguments, **call.keywords)
        except Reached:
            return seen, stream
    return seen, output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def recorded_calls(layers: Sequence[Any], forward: Callable[[], Any]) -> tuple[Tensor, list[Call]]:
    """As `layer_calls`, of a model of which no more is known than its layers.

    Args:
        layers: its decoder layers, first to last; none is computed, nor is what comes after the last.
        forward: a pass through it.
    """
    # A model knows which of the two its layers put out.
    for output in (lambda stream: stream, lambda stream: (stream, None, None)):
        streams, calls = _recorded(layers, forward, output=output)
        if len(calls) == len(layers) and all(stream.shape == streams[0].shape for stream in streams):
            return streams[0], calls
    raise RuntimeError(f"a pass has not gone through {len(layers)} layers one after the other")


def _recorded(
    layers: Sequence[Any], forward: Callable[[], Any], *, output: Callable[[Tensor], Any]
) -> tuple[list[Tensor], list[Call]]:
    streams: list[Tensor] = []
    calls: list[Call] = []

    def record(*arguments: Any, **keywords: Any) -> Any:
        # Some families hand the stream over by name.
        stream, others = (arguments[0], arguments[1:]) if arguments else (keywords.pop("hidden_states"), ())
        streams.append(stream)
        calls.append(Call(others, keywords))
        if len(calls) == len(layers):
            raise Reached
        return output(stream)

    try:
        for layer in layers:
            layer.forward = record
        # What records must not be compiled into the layers.
        with torch.compiler.set_stance("force_eager"), suppress(Reached, *_MISTAKEN):
            forward()
    finally:
        for layer in layers:
            del layer.forward
    return streams, calls


def first_inputs(model: PreTrainedModel, batches: Iterable[Inputs]) -> tuple[list[Tensor], list[list[Call]]]:
    """Batch by batch, the residual stream that the first decoder layer reads, and what every layer is called with."""
    streams: list[Tensor] = []
    calls: list[list[Call]] = []
    for batch in batches:
        stream, of_layers = layer_calls(model, **batch.keywords())
        streams.append(stream)
        calls.append(of_layers)
    return streams, calls


@contextmanager
def listening(layer: nn.Module, places: Sequence[Place], *, until: str | None) -> Iterator[dict[str, Tensor]]:
    """What is read at the places while the context lasts, by their names; see `run_layer`."""
    seen: dict[str, Tensor] = {}

    def listen(place: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def record(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[place] = arguments[0]
            if place == until:
                raise Reached

        return record

    handles = [layer.get_submodule(place.members[0]).register_forward_pre_hook(listen(place.name)) for place in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
