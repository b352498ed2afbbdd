"""Walking a model layer by layer: what the parts of a layer read, and where a pass may end early.

Legend: B sequences, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.stored.paging.passing import Call, Reached, layer_calls as layer_calls
from shearing.pruning.calibration.places import Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_OUTPUTS: tuple[Callable[[Tensor], Any], ...] = (lambda stream: stream, lambda stream: (stream, None, None))
"""What layers may put out; a model knows which of the two its own do."""

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

    Raises:
        ShearingError: the pass does not go through all layers, one after the other.
    """
    for output in _OUTPUTS:
        streams, calls = _recorded(layers, forward, output=output)
        if len(calls) == len(layers) and all(s.ndim == 3 and s.shape == streams[0].shape for s in streams):
            return streams[0], calls
    raise ShearingError(
        "model",
        value=f"a model whose text does not go through its {len(layers)} layers",
        allowed="one that hands a stream of text, without images or sound, from each of its layers to the next",
        mend="choose criterion magnitude, which reads no text, with allocation uniform or alpha",
    )


def after_layers(model: PreTrainedModel, layers: Sequence[Any], stream_BSD: Tensor) -> Tensor:
    """Logits [B, S, V] that a model makes of what its last layer puts out, with gradient; no layer is computed.

    Args:
        model: predicts the next token; its layers may be without weights.
        layers: its decoder layers, first to last.
        stream_BSD: residual streams after the last.

    Raises:
        ShearingError: it makes no logits of them.
    """
    ids_BS = torch.zeros(stream_BSD.shape[:2], dtype=torch.int64, device=stream_BSD.device)  # any: it is not computed
    for output in _OUTPUTS:

        def stand_in(*arguments: Any, last: bool, output: Callable[[Tensor], Any] = output, **keywords: Any) -> Any:
            return output(stream_BSD if last else arguments[0] if arguments else keywords["hidden_states"])

        logits: Tensor | None = None
        with _replaced(layers, [partial(stand_in, last=layer is layers[-1]) for layer in layers]), suppress(*_MISTAKEN):
            logits = model(input_ids=ids_BS, use_cache=False).logits
        if logits is not None and logits.shape[:-1] == stream_BSD.shape[:-1]:
            return logits
    raise ShearingError(
        "model",
        value=f"{type(model).__name__}, which makes no predictions of what its last layer puts out",
        allowed="a model of text that does, where gradients of the loss are wanted",
        mend="choose a criterion without gradients, and allocation owl, depth, alpha or redundancy",
    )


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

    # What records must not be compiled into the layers.
    with (
        _replaced(layers, [record] * len(layers)),
        torch.compiler.set_stance("force_eager"),
        suppress(Reached, *_MISTAKEN),
    ):
        forward()
    return streams, calls


@contextmanager
def _replaced(layers: Sequence[Any], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Functions in place of what layers compute, while the context lasts."""
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            layer.forward = function
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before


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
