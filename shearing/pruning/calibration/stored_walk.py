"""Walking a model that is on disk: one decoder layer's weights at a time, and the text's residual streams before it.

Legend: B sequences of a chunk, S positions, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import keep_attention_within_documents
from shearing.models.families.experts.separate import separate_experts
from shearing.models.loading import skeleton
from shearing.models.stored.expert_files import name_in_files
from shearing.models.stored.paging.heap import give_back
from shearing.models.stored.paging.passing import Call, layer_calls
from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.places import Place, last_computed, weight_of
from shearing.pruning.calibration.residual_streams import Offload, Streams
from shearing.pruning.calibration.statistics import InputStatistics, Need
from shearing.pruning.calibration.text import Calibration
from shearing.pruning.calibration.walk import after_layers, recorded_calls, run_layer

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
        structure = source.structure
        self._stored_names: Mapping[str, str] = {} if structure is None else structure.stored_names
        self._family = None if structure is not None else anatomy_of(source.config)
        # A copy: models that share a config share the kernel of attention.
        self._model = skeleton(deepcopy(source.config)) if structure is None else structure.model
        if structure is None:
            separate_experts(self._model)
        if calibration is not None and calibration.attention_within:
            keep_attention_within_documents(self._model)
        layers = anatomy_of(source.config).layers if structure is None else structure.layers
        assert layers is not None
        self._layers = layers
        self._has_head = False
        _move_buffers(self._model, device=compute.device)
        self._calls: dict[int, list[Call]] = {}  # of each chunk, by its first sequence
        self._chunks: list[slice] = []
        if calibration is not None:
            self._chunks = chunks_of(calibration, compute=compute)
            self._streams = self._first_streams(calibration)

    def name(self, layer: int, parameter: str) -> str:
        """Name in `Source` of what a layer calls `parameter`."""
        name = f"{self._layers}.{layer}.{parameter}"
        return self._stored_names.get(name, name) if self._family is None else name_in_files(self._family, name)

    def load(self, layer: int, *, instead: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
        """A layer with its weights on the compute device, and the same by full name as they are stored.

        Args:
            layer: its index.
            instead: weights by full name that replace those of the source.
        """
        module, structure = self._module(layer), self._source.structure
        state = module.state_dict() if structure is not None else dict(module.named_parameters())
        inside = f"{self._layers}.{layer}."
        made = [] if structure is None else [name for name in state if inside + name in structure.made]
        names = {self.name(layer, name): name for name in state if name not in made}
        stored = {**self._source.read(names), **(instead or {})}
        self._fill(module, names=names, stored=stored)
        for name in made:
            assert structure is not None
            tensor = structure.made[inside + name]
            value = tensor.of(self._source.read(tensor.stored_names), model=self._model)
            self._fill(module, names={tensor.name: name}, stored={tensor.name: value})
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
            places: at least one, in the order of `places_of`.
            needs: which statistics.
            damping: see `damped_factors`.
            propagate: whether the streams become what the layer makes of them; else they stay in front of it, and the
                pass ends at the last place.

        Raises:
            ShearingError: what a place reads is NaN or infinite, or text does not come to it.
        """
        statistics = {
            place.name: InputStatistics(
                weight_of(module, place.members[0]).shape[1], needs=needs, device=self._compute.device, damping=damping
            )
            for place in places
        }
        # In which order layers of an unknown structure are computed is not known either.
        until = None if propagate or self._source.structure is not None else last_computed(places).name
        for chunk in self._chunks:
            stream = self._streams.read(chunk)
            seen, after = run_layer(module, module, stream, self._call(layer, chunk), places=places, until=until)
            for name, inputs in seen.items():
                statistics[name].add(inputs, sequences=len(stream))
            if propagate:
                self._streams.write(chunk, after)
            self._advance(1)
        for place in places:
            name, of_place = place.name, statistics[place.name]
            # An expert that no token is sent to is called as well, with none.
            if not of_place.sequences:
                raise not_reached(f"{name} in layer {layer}", module=f"*.{place.members[0]}")
            of_place.assume_alike_if_none()
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

    @property
    def width(self) -> int:
        """Numbers of a token in the residual streams (d)."""
        return self._streams.width

    def logits(self, stream: Tensor) -> Tensor:
        """What a model that no family declares predicts [B, S, V] of streams [B, S, d] after its last layer."""
        if not self._has_head:
            self._fill_outside(self._model)
            self._model.tie_weights()
            self._has_head = True
        return after_layers(self._model, self._modules(), stream)

    def pass_by(self) -> None:
        """Counts a pass that nobody needs."""
        self._advance(len(self._chunks))

    def _first_streams(self, calibration: Calibration) -> Streams:
        compute, streams = self._compute, None
        enter = self._by_embeddings() if self._source.structure is None else self._by_structure()
        by_size: dict[int, list[Call]] = {}
        for chunk in self._chunks:
            first, calls = enter(calibration.inputs(chunk, device=compute.device))
            others = by_size.setdefault(chunk.stop - chunk.start, calls)
            # Of a family that is declared they depend on the shape of the text alone, and on documents.
            same = (self._source.structure is None and not calibration.attention_within) or _are_alike(others, calls)
            self._calls[chunk.start] = others if same else calls
            if streams is None:
                shape = (*calibration.tokens.shape, first.shape[-1])
                streams = Streams(
                    shape, dtype=compute.dtype, device=compute.device, offload=compute.offload, folder=compute.folder
                )
            streams.write(chunk, first)
        assert streams is not None
        return streams

    def _by_embeddings(self) -> Callable[[Inputs], tuple[Tensor, list[Call]]]:
        """What becomes of tokens [B, S] before the first layer, from the embedding alone."""
        family = anatomy_of(self._source.config)
        name = f"{family.embedding}.weight"
        embedding = self._source.read([name])[name]
        scale = family.embedding_scale(embedding.shape[1])

        def enter(text: Inputs) -> tuple[Tensor, list[Call]]:
            keywords = text.keywords()
            embedded = embedding[keywords.pop("input_ids").cpu()].to(self._compute.device, self._compute.dtype)
            embedded = embedded if scale == 1.0 else embedded * torch.full((), scale).to(embedded)
            return layer_calls(self._model, inputs_embeds=embedded, **keywords)

        return enter

    def _by_structure(self) -> Callable[[Inputs], tuple[Tensor, list[Call]]]:
        """The same, from all that there is outside of the layers and before the head."""
        model: Any = self._model.base_model
        self._fill_outside(model)
        layers = self._modules()

        def enter(text: Inputs) -> tuple[Tensor, list[Call]]:
            return recorded_calls(layers, lambda: model(**text.keywords()))

        return enter

    def _fill_outside(self, model: nn.Module) -> None:
        """Gives what is outside of the layers, and of towers that no text goes through, its weights."""
        structure = self._source.structure
        assert structure is not None
        apart = [*self._modules(), *(self._model.get_submodule(tower) for tower in structure.towers)]
        left = {id(tensor) for module in apart for tensor in module.state_dict(keep_vars=True).values()}
        prefix = "" if model is self._model else f"{self._model.base_model_prefix}."
        outside = {
            self._stored_names[f"{prefix}{name}"]: name
            for name, tensor in model.state_dict(keep_vars=True).items()
            if id(tensor) not in left and f"{prefix}{name}" in self._stored_names
        }
        self._fill(model, names=outside, stored=self._source.read(outside))

    def _fill(self, module: nn.Module, *, names: Mapping[str, str], stored: Mapping[str, Tensor]) -> None:
        exact = getattr(self._model, "_keep_in_fp32_modules_strict", None) or ()
        fp32 = {name for name in names.values() if any(part in name for part in exact)}
        fill(module, names=names, stored=stored, device=self._compute.device, dtype=self._compute.dtype, fp32=fp32)

    def _modules(self) -> list[nn.Module]:
        return list(self._model.get_submodule(self._layers).children())

    def _module(self, layer: int) -> nn.Module:
        return self._model.get_submodule(f"{self._layers}.{layer}")

    def _call(self, layer: int, chunk: slice) -> Call:
        return self._calls[chunk.start][layer]


def fill(
    module: nn.Module,
    *,
    names: Mapping[str, str],
    stored: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    fp32: Container[str] = (),
) -> None:
    """Gives a module its weights, as copies that need no gradient, and its buffers.

    Args:
        module: without weights.
        names: its names for them by their full names.
        stored: by full name.
        device, dtype: of the copies.
        fp32: its names for those that are kept in fp32, whatever the dtype.
    """
    for full, name in names.items():
        place, _, leaf = name.rpartition(".")
        owner, tensor = module.get_submodule(place), stored[full]
        wanted = torch.float32 if name in fp32 else dtype if tensor.is_floating_point() else tensor.dtype
        copied = tensor.to(device, wanted, copy=True)
        is_buffer = leaf in dict(owner.named_buffers(recurse=False))
        setattr(owner, leaf, copied if is_buffer else nn.Parameter(copied, requires_grad=False))


def _are_alike(some: Sequence[Call], others: Sequence[Call]) -> bool:
    """Whether layers can be called with either: what they are handed is equal, and nothing that they could write to."""
    return some is others or all(
        len(one.arguments) == len(other.arguments)
        and all(map(_is_alike, one.arguments, other.arguments))
        and _is_alike_mapping(one.keywords, other.keywords)
        for one, other in zip(some, others, strict=True)
    )


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_is_alike, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return bool(one) and _is_alike_mapping(one, other)  # an empty one is there to be filled
    return one is other or (isinstance(one, bool | int | float | str) and one == other)


def _is_alike_mapping(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(_is_alike(value, other[name]) for name, value in one.items())


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


def not_reached(what: str, *, module: str) -> ShearingError:
    """The error about a linear layer that text does not go through, as some of models that no family declares."""
    return ShearingError(
        "model",
        value=what,
        allowed="linear layers that the calibration text goes through",
        mend=f"leave it dense: exclude '{module}'",
    )


def _move_buffers(model: PreTrainedModel, *, device: torch.device) -> None:
    """Buffers alone: moving the module would give memory to weights that are not there."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
