"""The small state of a run beside the weights: JSON, tensors and the states of random generators."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from shearing.files.durable import write_text
from shearing.files.tensors import write_tensors


def write_state(folder: Path, name: str, state: Mapping[str, Any]) -> None:
    """Write a nested state: tensors to NAME.safetensors, the rest to NAME.json.

    Args:
        folder: existing folder.
        name: name of both files, without suffix.
        state: dicts (keys str or int), lists, tuples, tensors, str, int, float, bool and None; floats are exact too.

    Raises:
        TypeError: any other type.
    """
    tensors: dict[str, Tensor] = {}
    tree = _to_json(state, path="", tensors=tensors)
    write_tensors(folder / f"{name}.safetensors", tensors)
    write_text(folder / f"{name}.json", json.dumps(tree) + "\n")


def on_host(state: Any) -> Any:
    """A nested state with copies in host memory of its tensors: what happens to those later does not change it."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: on_host(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(on_host(value) for value in state)
    return state


def read_state(folder: Path, name: str, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_state` was given, tensors on `device`."""
    tensors = load_file(folder / f"{name}.safetensors", device=str(device))
    state: dict[str, Any] = _from_json(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), tensors)
    return state


def seed_random(seed: int) -> None:
    """Start every random generator that code under the loop may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """State of every random generator that code under the loop may draw from; of GPUs, this process's own."""
    generator = np.random.get_state(legacy=False)
    return {
        "python": random.getstate(),
        "numpy": {
            **generator,
            "state": {
                "key": torch.from_numpy(generator["state"]["key"].astype(np.int64)),
                "pos": int(generator["state"]["pos"]),
            },
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set what `random_states` returned; of a GPU's where there is one, whatever number it has now."""
    random.setstate(states["python"])
    generator = states["numpy"]
    np.random.set_state(
        {**generator, "state": {**generator["state"], "key": generator["state"]["key"].numpy().astype(np.uint32)}}
    )
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available():
        own = states["cuda"]
        if isinstance(own, list):  # older checkpoints have those of all GPUs
            own = dict(enumerate(own)).get(torch.cuda.current_device())
        if own is not None:
            torch.cuda.set_rng_state(own)


def _to_json(value: Any, *, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy, because safetensors refuses views of one memory (multipliers are often slices of a flat tensor).
        tensors[path] = value.detach().clone()
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[key, _to_json(item, path=f"{path}/{key}", tensors=tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_to_json(item, path=f"{path}/{index}", tensors=tensors) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"{path or 'state'}: {type(value).__name__} cannot be written to a checkpoint")


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content}
    items = [_from_json(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)
