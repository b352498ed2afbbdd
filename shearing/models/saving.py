"""A model written as a Hugging Face folder that any reader opens: config, and weights in safetensors files."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shearing.files.durable import write_json
from shearing.files.tensors import write_tensors
from shearing.models.spellings import in_both_spellings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as the hub's tools have it."""


def write_model(model: PreTrainedModel, folder: Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write config.json and the weights, each once where they are tied, under the names that transformers reads.

    One shard is copied at a time. Nothing else is written: tokenizer and the like are the source's own files.

    Args:
        model: whole, on any device.
        folder: made if it is not there.
        shard_bytes: a file has at most as many, unless a single tensor has more.

    Raises:
        OSError, SafetensorError: see `write_tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(model)
    shards = _shards(tensors, shard_bytes=shard_bytes)
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: tensors[name].detach().cpu() for name in names}, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    write_json(folder / "config.json", config_content(model))


def config_content(model: PreTrainedModel) -> dict[str, Any]:
    """What config.json says of a model, in both spellings, sorted by name."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    return dict(sorted(in_both_spellings(json.loads(config.to_json_string(use_diff=True))).items()))


def _tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    stored = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {**dict(model.named_parameters()), **buffers}


def _shards(tensors: Mapping[str, Tensor], *, shard_bytes: int) -> Sequence[Sequence[str]]:
    def filled() -> Iterator[list[str]]:
        names: list[str] = []
        size = 0
        for name, tensor in tensors.items():
            if names and size + tensor.nbytes > shard_bytes:
                yield names
                names, size = [], 0
            names.append(name)
            size += tensor.nbytes
        yield names

    return list(filled())
