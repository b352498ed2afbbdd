"""A model written as a Hugging Face folder that any reader opens: config, and weights in safetensors files."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shearing.errors import ShearingError, key
from shearing.files.durable import write_json
from shearing.files.tensors import opened_in_turn
from shearing.models.anatomy import anatomy_of
from shearing.models.stored.companions import copy_companions, folder_of
from shearing.models.stored.expert_files import parts_of
from shearing.models.stored.spellings import in_both_spellings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
"""Largest file of weights, as the hub's tools have it."""


DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""In which weights can be written, by the names of settings."""


def write_model(
    model: PreTrainedModel,
    folder: Path,
    *,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    use_cache: bool | None = None,
) -> None:
    """Write config.json and the weights, each once where they are tied, under the names that transformers reads.

    One tensor is copied at a time. Nothing else is written: tokenizer and the like are the source's own files.

    Args:
        model: on any device; it stays as it is. A skeleton will do where `weights` are given.
        folder: made if it is not there.
        weights: all of them by the model's names, in any order; None: those of the model.
        dtype: of the weights in the files; as they are if None.
        shard_bytes: a file has at most as many, unless a single tensor has more.
        use_cache: what config.json says of it; None: what the model's config does.

    Raises:
        ShearingError: a weight is too large for the dtype.
        OSError: see `opened_in_turn`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_as_in_files(model, _named_tensors(model)))
    dtypes = {name: dtype or of.dtype if of.is_floating_point() else of.dtype for name, of in tensors.items()}
    like = {name: torch.empty(of.shape, dtype=dtypes[name], device="meta") for name, of in tensors.items()}
    sizes = {name: each.numel() * each.itemsize for name, each in like.items()}
    shards = _shards(sizes, shard_bytes=shard_bytes)
    places: dict[str, str] = {}
    write: dict[str, Callable[[str, Tensor], None]] = {}
    with ExitStack() as files:
        for number, names in enumerate(shards, start=1):
            file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            own = {name: like[name] for name in names}
            opened = files.enter_context(opened_in_turn(folder / file, own, metadata={"format": "pt"}))
            write |= dict.fromkeys(names, opened)
            places |= dict.fromkeys(names, file)
        for name, tensor in _as_in_files(model, _named_tensors(model) if weights is None else weights):
            write[name](name, _stored(tensor, name=name, dtype=dtypes[name]))
    if len(shards) > 1:
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(places.items()))},
        )
    write_json(folder / "config.json", _config_content(model, dtype=dtype or model.dtype, use_cache=use_cache))


def save_model(model: PreTrainedModel, folder: Path, *, like: str, revision: str | None = None) -> None:
    """Write a model as a folder that any reader opens, with the files of the model it was made of beside its weights.

    `save_pretrained` of transformers 5 writes no tokenizer, and a config of which version 4 takes a wrong RoPE.

    Args:
        model: on any device; it stays as it is.
        folder: made if it is not there.
        like: folder or hub name of the model it was made of, whose tokenizer, chat templates, licence and the like go
            with it; and whether a reader keeps keys and values, which a model to train is loaded without.
        revision: of a hub name.

    Raises:
        OSError: see `write_model`; or files of a hub name are not here and cannot be downloaded.
    """
    beside = folder_of(like, revision=revision)
    write_model(model, folder, use_cache=_use_cache(beside))
    copy_companions(beside, to=folder)


def _use_cache(folder: Path) -> bool:
    """What the config.json of a folder says of it; configs leave out what is transformers' default."""
    path = folder / "config.json"
    return not path.is_file() or json.loads(path.read_text(encoding="utf-8")).get("use_cache", True) is not False


@torch.no_grad()
def round_weights(model: PreTrainedModel, *, dtype: torch.dtype) -> None:
    """Round every weight to a dtype and back, in place."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _config_content(model: PreTrainedModel, *, dtype: torch.dtype, use_cache: bool | None) -> dict[str, Any]:
    config = copy.deepcopy(model.config)
    if use_cache is not None:
        config.use_cache = use_cache
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    return dict(sorted(in_both_spellings(json.loads(config.to_json_string(use_diff=True))).items()))


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """What belongs in files, under the model's own names, each once where weights are tied."""
    stored = model.state_dict().keys()
    yield from model.named_parameters()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in stored)


def _as_in_files(model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the model's own names as files have them: under other names, or in parts."""
    stored_name = anatomy_of(model.config).stored_name
    for name, tensor in tensors:
        for part in parts_of(model.config, name, shape=tuple(tensor.shape)):
            yield stored_name(part.name), part.of(tensor)


def _stored(tensor: Tensor, *, name: str, dtype: torch.dtype) -> Tensor:
    stored = tensor.detach().cpu().to(dtype)
    if dtype == torch.float16 and not bool(torch.isfinite(stored).all()):
        raise ShearingError(
            "save_dtype",
            value=f"fp16, with {float(tensor.detach().abs().max()):g} in {name}",
            allowed=f"weights of at most {torch.finfo(dtype).max:g} in fp16",
            mend=f"set {key('save_dtype')}=bf16 or fp32, and run the same command again",
        )
    return stored


def _shards(sizes: Mapping[str, int], *, shard_bytes: int) -> Sequence[Sequence[str]]:
    def filled() -> Iterator[list[str]]:
        names: list[str] = []
        size = 0
        for name, of_tensor in sizes.items():
            if names and size + of_tensor > shard_bytes:
                yield names
                names, size = [], 0
            names.append(name)
            size += of_tensor
        yield names

    return list(filled())
