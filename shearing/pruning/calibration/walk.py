"""Walking a model layer by layer: what the parts of a layer read, and where a pass may end early.

Legend: B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.stored.passing import Call, Reached, layer_calls as layer_calls
from shearing.pruning.calibration.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
