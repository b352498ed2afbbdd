"""Walking a model that is on disk: one decoder layer's weights at a time, and the text's residual streams before it.

Legend: B sequences of a chunk, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.loading import skeleton
from shearing.models.stored.heap import give_back
from shearing.models.stored.passing import Call, layer_calls
from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.places import Place, weight_of
from shearing.pruning.calibration.residual_streams import Offload, Streams
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.calibration.walk import run_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Compute:
    """Where and how layers are computed.

    Attributes:
        device: the compute device.
        dtype: of weights and activations while they are on it.
        micro_batch_size: sequences on it at a time (B).
        offload: where the other sequences' streams are.
        folder: for what is offloaded to disk.
    """

    device: torch.device
    dtype: torch.dtype
    micro_batch_size: int
    offload: Offload
    folder: Path


class LayerWalk:
    """Goes through the layers in order; what a layer has become by then is what the text passes through.

    Args:
        source: the model.
        calibration: the text; None: no text is propagated, and layers are only loaded.
        compute: where and how.
        advance: called with 1 for every chunk of sequences that went through a layer.
    """

    def __init__(
        self,
        source: Source,
        *,
        calibration: Calibration | None,
        compute: Compute,
        advance: Callable[[int], None],
    ) -> None:
        self._source, self._compute, self._advance = source, compute, advance
        self._family = anatomy_of(source.config)
        self._model = skeleton(source.config)
        _move_buffers(self._model, device=compute.device)
        self._calls: dict[int, list[Call]] = {}
        self._chunks: list[slice] = []
        if calibration is not None:
            self._chunks = chunks_of(calibration, compute=compute)
            self._streams = self._first_streams(calibration)

    def name(self, layer: int, member: str) -> str:
        """Name in the model's state dict of what a layer calls `member`."""
        return f"{self._family.layers}.{layer}.{member}"

    def load(self, layer: int, *, instead: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """A layer with its weights on the compute device, and the same by full name as they are stored.

        Args:
            layer: its index.
            instead: weights by full name that replace those of the source.
        """
        module = decoder_layers(self._model)[layer]
        names = {self.name(layer, name): name for name, _ in module.named_parameters()}
        stored = {**self._source.read(names), **(instead or {})}
        fill(module, names=names, stored=stored, device=self._compute.device, dtype=self._compute.dtype)
        return module, stored

    def let_go(self, module: nn.Module) -> None:
        """Frees a layer's weights; their shapes stay."""
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                empty = torch.empty((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)
                setattr(owner, name, nn.Parameter(empty, requires_grad=False))
        give_back()

    def statistics(
        self,
        layer: int,
        module: nn.Module,
        places: Sequence[Place],
        *,
        needs: frozenset[Need],
        damping: float,
        propagate: bool,
    ) -> dict[str, InputStatistics]:
        """Statistics of what the places of a layer read, by name of the place; one pass over the text.

        Args:
            layer, module: its index, and itself as `load` gave it.
            places: at least one, in the order in which they are computed.
            needs: which statistics.
            damping: see `damped_factors`.
            propagate: whether the streams become what the layer makes of them; else they stay in front of it, and the
                pass ends at the last place.

        Raises:
            ShearingError: what a place reads is NaN or infinite.
        """
        statistics = {
            place.name: InputStatistics(
                weight_of(module, place.members[0]).shape[1], needs=needs, device=self._compute.device, damping=damping
            )
            for place in places
        }
        until = None if propagate else places[-1].name
        for chunk in self._chunks:
            seen, after = run_layer(
                module, module, self._streams.read(chunk), self._call(layer, chunk), places=places, until=until
            )
            for name, inputs in seen.items():
                statistics[name].add(inputs)
            if propagate:
                self._streams.write(chunk, after)
            self._advance(1)
        for name, of_place in statistics.items():
            if not of_place.is_finite():
                raise not_finite(f"layer {layer} ({name})")
        return statistics

    def propagate(self, layer: int, module: nn.Module) -> None:
        """Replaces the streams by what the layer makes of them."""
        for chunk in self._chunks:
            self._streams.write(chunk, self.run(layer, module, self._streams.read(chunk), chunk))
            self._advance(1)

    def run(self, layer: int, module: nn.Module, stream: Tensor, chunk: slice) -> Tensor:
        """What a layer makes of a stream [B, S, d] of some sequences."""
        return run_layer(module, module, stream, self._call(layer, chunk), places=())[1]

    @property
    def chunks(self) -> list[slice]:
        """Sequences that are on the compute device together."""
        return self._chunks

    def stream(self, chunk: slice) -> Tensor:
        """The residual streams [B, S, d] of some sequences as they are now, a copy on the compute device."""
        return self._streams.read(chunk)

    def pass_by(self) -> None:
        """Counts a pass that nobody needs."""
        self._advance(len(self._chunks))

    def _first_streams(self, calibration: Calibration) -> Streams:
        name = f"{self._family.embedding}.weight"
        embedding = self._source.read([name])[name]
        shape = (*calibration.tokens.shape, embedding.shape[1])
        compute = self._compute
        streams = Streams(
            shape, dtype=compute.dtype, device=compute.device, offload=compute.offload, folder=compute.folder
        )
        for chunk in self._chunks:
            embedded = embedding[calibration.tokens[chunk]].to(compute.device, compute.dtype)
            first, calls = layer_calls(self._model, inputs_embeds=embedded, use_cache=False)
            self._calls.setdefault(chunk.stop - chunk.start, calls)
            streams.write(chunk, first)
        return streams

    def _call(self, layer: int, chunk: slice) -> Call:
        return self._calls[chunk.stop - chunk.start][layer]


def fill(
    module: nn.Module,
    *,
    names: Mapping[str, str],
    stored: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Gives a module its weights, as copies that need no gradient.

    Args:
        module: without weights.
        names: its names for them by their full names.
        stored: by full name.
        device, dtype: of the copies.
    """
    for full, name in names.items():
        owner, _, leaf = name.rpartition(".")
        weight = stored[full].to(device, dtype, copy=True)
        setattr(module.get_submodule(owner), leaf, nn.Parameter(weight, requires_grad=False))


def chunks_of(calibration: Calibration, *, compute: Compute) -> list[slice]:
    """Sequences that are on the compute device together."""
    samples = calibration.tokens.shape[0]
    return [
        slice(start, min(start + compute.micro_batch_size, samples))
        for start in range(0, samples, compute.micro_batch_size)
    ]


def not_finite(where: str) -> ShearingError:
    """The error about a model that computes NaN or infinity there."""
    return ShearingError(
        "model",
        value=f"NaN or infinity in {where}",
        allowed="finite activations and weights",
        mend="compute in fp32 (precision: fp32), or check that the source model works on this text",
    )


def _move_buffers(model: PreTrainedModel, *, device: torch.device) -> None:
    """Buffers alone: moving the module would give memory to weights that are not there."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
