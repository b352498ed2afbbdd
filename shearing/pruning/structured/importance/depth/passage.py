"""Forward passes through a model some of whose layers or sub-layers are not there.

Legend: B sequences, S positions, D hidden size, L layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.shape import Shape
from shearing.models.stored.paging.passing import layer_calls
from shearing.pruning.calibration.walk import run_layer
from shearing.pruning.structured.importance.metric import Cost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SubLayers = frozenset[tuple[str, int]]
"""`attention` or `mlp`, and the layer that it is of."""


def parts_of(kind: str, *, layers: int) -> list[SubLayers]:
    """What may be left out, one after the other from the bottom up.

    Args:
        kind: `layers`, each with both of its sub-layers; or `sublayers`, each alone.
        layers: L.
    """
    pairs = [[("attention", layer), ("mlp", layer)] for layer in range(layers)]
    if kind == "layers":
        return [frozenset(pair) for pair in pairs]
    return [frozenset([sublayer]) for pair in pairs for sublayer in pair]


def lowest_layer(part: SubLayers) -> int:
    """Where a part begins to change the residual stream."""
    return min(layer for _, layer in part)


def as_scores(kind: str, values: Tensor) -> dict[str, Tensor]:
    """Values of `parts_of` by granularity, as `Scores`."""
    values = values.float().cpu()
    return {"layers": values} if kind == "layers" else {"attention": values[0::2], "mlp": values[1::2]}


class Passage:
    """The way of one batch through a model: what every layer is called with is found out once.

    What is left out writes nothing; a layer without both of its sub-layers is not computed. The model stays as it is.

    Attributes:
        stream: residual stream [B, S, D] that the first layer reads.
    """

    def __init__(self, model: PreTrainedModel, batch: Inputs) -> None:
        self._family = anatomy_of(model)
        self._layers = list(decoder_layers(model))
        self._final_norm = model.get_submodule(self._family.final_norm.name)
        self.stream, self._calls = layer_calls(model, **batch.keywords())

    def through_layer(self, index: int, stream: Tensor, *, gone: SubLayers) -> Tensor:
        """The residual stream after a layer, from the one before it."""
        absent = [kind for kind in self._family.sublayers if (kind, index) in gone]
        if len(absent) == len(self._family.sublayers):
            return stream
        layer = self._layers[index]
        with self._silent(layer, absent):
            return run_layer(layer, layer, stream, self._calls[index], places=())[1]

    def to_end(self, stream: Tensor, *, first: int = 0, gone: SubLayers) -> Tensor:
        """Hidden states [B, S, D] after the final norm, from the residual stream before layer `first`."""
        for index in range(first, len(self._layers)):
            stream = self.through_layer(index, stream, gone=gone)
        hidden: Tensor = self._final_norm(stream)
        return hidden

    @contextmanager
    def _silent(self, layer: nn.Module, kinds: list[str]) -> Iterator[None]:
        handles = []
        for kind in kinds:
            sublayer = self._family.sublayers[kind]
            last = sublayer.write if sublayer.after is None else sublayer.after.name
            handles.append(layer.get_submodule(last).register_forward_hook(_nothing))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _nothing(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def cost_of(source: Shape, *, layers: float, heads: float, tokens: int, other_flops: float = 0.0) -> Cost:
    """What it takes to run some layers and the head over a text.

    Args:
        source: sizes of the model.
        layers: how often a layer is computed, all layers together.
        heads: how often the head is.
        tokens: of the text.
        other_flops: what comes on top.
    """
    passes = layers / source.num_hidden_layers
    # A pass through the whole model has one head: what is more is said apart, 2 D V a token.
    head = 2.0 * source.hidden_size * source.vocab_size * tokens * max(0.0, heads - passes)
    return Cost(forward_tokens=passes * tokens, other_flops=head + other_flops)
