"""The model that an export wrote, on the GPU, with the layers converted that were measured to be faster."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.models.loading import load_source
from shearing.pruning.sparse.recipe import COMPONENT_NAMES
from shearing.pruning.sparse.semi_structured.hardware import Hardware, find_hardware
from shearing.pruning.sparse.semi_structured.layout import first_violation, without_negative_zeros
from shearing.pruning.sparse.stored.manifest import read_description

MANIFEST = "semi_structured.json"
FORMAT = 1
PRECISIONS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@named(COMPONENT_NAMES)
def load(folder: Path | str, *, hardware: Hardware | None = None) -> PreTrainedModel:
    """Load what `shear export --semi-structured` has written: on the GPU, for inference, its faster layers converted.

    Its `generate` and its forward pass are used as of any Hugging Face model; it cannot be trained or saved. On another
    GPU, or with another torch, than the export was measured with, a warning says so: what was faster there may not be.

    Args:
        folder: of the exported model.
        hardware: where to; the GPU of this process if None.

    Returns:
        The model in evaluation mode, in the precision of the export.

    Raises:
        ShearingError: no export, no hardware for it, a backend that is not here, or weights that are no longer 2:4.
    """
    folder = Path(folder)
    manifest = read_export(folder)
    hardware = hardware or find_hardware()
    backends = {name: layer["backend"] for name, layer in manifest["layers"].items()}
    _require_backends(backends, hardware=hardware, folder=folder)
    _compare(manifest["measured"], hardware=hardware)
    model = load_source(str(folder), device=hardware.device, dtype=PRECISIONS[manifest["precision"]])
    convert_layers(model, backends=backends, hardware=hardware)
    model.config.use_cache = True
    return model


def read_export(folder: Path) -> dict[str, Any]:
    """What an export says about itself.

    Raises:
        ShearingError: there is none, or one that this version cannot read.
    """
    return read_description(
        folder / MANIFEST,
        version=FORMAT,
        of="a model that `shear export --semi-structured` has written",
        mend="export the sparse model first, on the GPU that will run it",
        again="export it again",
    )


@torch.no_grad()
def convert_layers(model: PreTrainedModel, *, backends: Mapping[str, str], hardware: Hardware) -> None:
    """Put converted weights into linear layers of a model, one after the other, in place.

    Args:
        model: on the device of `hardware`.
        backends: name of a linear layer -> backend, one of the hardware's.
        hardware: what converts.

    Raises:
        ShearingError: a weight is not 2:4.
    """
    for name, backend in backends.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        violation = first_violation(layer.weight)
        if violation is not None:
            raise ShearingError(
                f"{name}.weight",
                value=str(violation),
                allowed="at most 2 of each 4 consecutive inputs of a row that are not zero",
                mend="the weights have changed since the export: export the model again",
            )
        weight = without_negative_zeros(layer.weight.detach()).contiguous()
        layer.weight = nn.Parameter(hardware.converters[backend](weight), requires_grad=False)


def _require_backends(backends: Mapping[str, str], *, hardware: Hardware, folder: Path) -> None:
    missing = sorted(set(backends.values()) - hardware.converters.keys())
    if missing:
        raise ShearingError(
            str(folder),
            value=f"layers for {', '.join(missing)}, which does not work on this {hardware.name}",
            allowed=f"layers for {', '.join(hardware.converters)}",
            mend="export the model again on this device: shear export MODEL --semi-structured -o ANOTHER",
        )


def _compare(measured: Mapping[str, Any], *, hardware: Hardware) -> None:
    here = {"device": hardware.name, "torch": environment(hardware.device)["torch"]}
    differing = [
        f"{key} was {measured[key]}, here it is {value}" for key, value in here.items() if measured[key] != value
    ]
    if differing:
        warnings.warn(
            f"layers were chosen elsewhere ({'; '.join(differing)}) and may be slower than dense ones here: "
            "export the model again on this device",
            stacklevel=3,
        )
