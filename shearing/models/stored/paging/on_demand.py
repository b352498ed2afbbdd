"""A model whose weights are read from its files when they are needed, and go again: one layer, or embedding, or head.

Nothing has to have room for the whole model then. Weights that are not there are NaN, so that what forgets to ask for
them computes nothing that could be taken for a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shearing.files.tensors import read_header, read_tensors
from shearing.models.anatomy import anatomy_of, backbone, decoder_layers
from shearing.models.loading import skeleton
from shearing.models.stored.expert_files import Part, parts_of
from shearing.models.stored.paging.heap import give_back
from shearing.models.stored.stored_model import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def on_demand(
    source: Source, *, device: torch.device, attn_implementation: str = "sdpa", instead: Path | None = None
) -> PreTrainedModel:
    """A model in evaluation mode, its weights fp32 and without gradients, cache off; it may be masked.

    A decoder layer's weights come when it is called, the embedding's when the backbone is, and stay until another
    unit's come; `weights_here` is for all else that reads weights, the head's among them.

    Args:
        source: the model's files.
        device: where weights are while they are there, and buffers.
        attn_implementation: as of `load_source`.
        instead: folder of safetensors files with tensors that replace some of the source's.

    Raises:
        ShearingError: later, where weights are read: a tensor holds NaN or infinity.
    """
    model = skeleton(source.config, attn_implementation=attn_implementation, device=device)
    files = _Files(source, instead=instead)
    weights = _Weights(files, device=device)
    parameters: dict[int, _Absent] = {}  # by identity: tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, parameters.setdefault(id(parameter), _Absent.of(parameter)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    family = anatomy_of(source.config)
    layers = decoder_layers(model)
    inside = [f"{family.layers}.{index}." for index in range(len(layers))]
    named = dict(model.named_parameters())
    units = [{name: each for name, each in named.items() if name.startswith(prefix)} for prefix in inside]
    for layer, names in zip(layers, units, strict=True):
        layer.register_forward_pre_hook(partial(weights.come, weights.unit(names)))
    outer = {name: each for name, each in named.items() if not name.startswith(f"{family.layers}.")}
    embedding, head = (declared.name for declared in family.embeddings)
    unit = weights.unit({embedding: outer.pop(embedding)})
    backbone(model).register_forward_pre_hook(partial(weights.come, unit))
    if head in outer:  # it is not the embedding
        weights.unit({head: outer.pop(head)})
    weights.hold(weights.unit(outer))  # the final norm
    return model


def is_on_demand(model: nn.Module) -> bool:
    """Whether weights of a model, masked or not, come on demand."""
    return any(isinstance(parameter, _Absent) for parameter in model.parameters())


@contextmanager
def weights_here(*owners: nn.Module | Tensor) -> Iterator[None]:
    """The weights of modules, or some weights with those that come together with them, are there inside the context.

    What is changed in them is gone when they go. Models that are whole are left as they are.
    """
    units: dict[int, _Unit] = {}
    for owner in owners:
        for parameter in owner.parameters() if isinstance(owner, nn.Module) else [owner]:
            if isinstance(parameter, _Absent):
                units[id(parameter.unit)] = parameter.unit
    with ExitStack() as held:
        for unit in units.values():
            unit.weights.hold(unit)
            held.callback(unit.weights.let_go, unit)
        yield


def weights_by_name(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The weights of a model, a tied one once; those that come on demand are there until the next one is looked up."""
    return _ByName(dict(model.named_parameters()))


def largest_tensor(model: PreTrainedModel) -> int:
    """Bytes of the largest weight in fp32."""
    return 4 * max(parameter.numel() for parameter in model.parameters())


class _ByName(Mapping[str, Tensor]):
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        if isinstance(parameter, _Absent):
            parameter.unit.weights.come(parameter.unit)
        return parameter.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


class _Absent(nn.Parameter):
    """A weight that comes with others."""

    unit: _Unit

    @classmethod
    def of(cls, parameter: nn.Parameter) -> _Absent:
        return cls(_placeholder(parameter), requires_grad=False)

    def leave(self) -> None:
        self.data = _placeholder(self)


def _placeholder(parameter: Tensor) -> Tensor:
    """As one number, whatever the shape."""
    with torch.inference_mode(False):
        return torch.full((), math.nan, device=parameter.device).expand(parameter.shape)


class _Unit:
    """Weights that come and go together, by their names in the files."""

    def __init__(self, parameters: Mapping[str, Any], *, weights: _Weights) -> None:
        self.parameters, self.weights = parameters, weights
        self.held = 0
        self.here = False
        for parameter in parameters.values():
            parameter.unit = self

    def leave(self) -> None:
        for parameter in self.parameters.values():
            parameter.leave()
        self.here = False
        give_back()


class _Weights:
    """Which units are there: those that are held, and the one that came last."""

    def __init__(self, files: _Files, *, device: torch.device) -> None:
        self._files, self._device = files, device
        self._last: _Unit | None = None

    def unit(self, parameters: Mapping[str, Any]) -> _Unit:
        return _Unit(parameters, weights=self)

    def come(self, unit: _Unit, *_: Any) -> None:
        if self._last is not unit:
            if self._last is not None and not self._last.held:
                self._last.leave()
            self._last = unit
        if not unit.here:
            # Whoever asks may be in inference mode; weights outlast it.
            with torch.inference_mode(False):
                for name, tensor in self._files.read(unit.parameters).items():
                    unit.parameters[name].data = tensor.to(self._device).to(torch.float32)
            unit.here = True

    def hold(self, unit: _Unit) -> None:
        self.come(unit)
        unit.held += 1

    def let_go(self, unit: _Unit) -> None:
        unit.held -= 1
        if not unit.held and unit is not self._last:
            unit.leave()


class _Files:
    """The files of a model, and those that replace some of its tensors."""

    def __init__(self, source: Source, *, instead: Path | None) -> None:
        self._source = source
        self._finite: set[str] = set()
        files = () if instead is None else sorted(instead.glob("*.safetensors"))
        self._instead = {name: path for path in files for name in read_header(path)[0]}

    def read(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights on the CPU, as they are stored; the source's are looked through when they are read first."""
        made_of = {name: [] if self._has(name) else self._parts(name, of=of) for name, of in parameters.items()}
        stored = self._read([part.name for parts in made_of.values() for part in parts])
        whole = self._read([name for name, parts in made_of.items() if not parts])
        for name, parts in made_of.items():
            if parts:
                whole[name] = torch.empty(parameters[name].shape, dtype=stored[parts[0].name].dtype)
                for part in parts:
                    whole[name][part.place] = stored[part.name]
        return whole

    def _has(self, name: str) -> bool:
        return name in self._instead or name in self._source.files

    def _parts(self, name: str, *, of: Tensor) -> list[Part]:
        return list(parts_of(self._source.config, name, shape=tuple(of.shape)))

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        of_file: dict[Path, list[str]] = {}
        first = [name for name in names if name not in self._finite and name not in self._instead]
        tensors = self._source.read(first)
        self._finite.update(first)
        for name in names:
            if name not in tensors:
                path = self._instead.get(name) or self._source.folder / self._source.files[name]
                of_file.setdefault(path, []).append(name)
        for path, wanted in of_file.items():
            tensors |= read_tensors(path, wanted)
        return tensors
