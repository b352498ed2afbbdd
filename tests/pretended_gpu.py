"""A GPU that is only pretended, for what can be told without one: where tensors meet, and where the host waits.

All is computed on the CPU. A tensor that is sent to the GPU, or made there, or of what is there, has a storage that is
remembered, and says that its device is `cuda:0`. What a real one refuses (an operation on a matrix of its own and one
of the host) or is slowed by (the host reads a value, and waits for all that is queued) is written down.

Not told: memory, half precision (its kernels, autocast), other threads, several GPUs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from tests.repository import ROOT

GPU, HOST = torch.device("cuda", 0), torch.device("cpu")

_OWN_DEVICE, _IS_ON_GPU = (vars(torch._C.TensorBase)[name].__get__ for name in ("device", "is_cuda"))
_READS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""Which take indices of the host too, and wait for bools of the GPU."""


@dataclass
class Record:
    """What was seen.

    Attributes:
        mixes: operations on tensors of both devices, each with the line of this project that led to it.
        waits: lines of this project that read from the GPU, each time in turn; not those of others that it calls.
    """

    mixes: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    _there: dict[int, StorageWeakRef] = field(default_factory=dict)

    def is_on_gpu(self, tensor: Tensor) -> bool:
        """Whether a tensor is pretended to be there."""
        return _storage(tensor) in self._there

    def put(self, tensor: Tensor, device: torch.device) -> None:
        """Pretend that a tensor's storage is on a device."""
        if device == HOST:
            self._there.pop(_storage(tensor), None)
        else:  # as long as it is referred to, no other storage has its address
            self._there[_storage(tensor)] = StorageWeakRef(tensor.untyped_storage())

    def wait(self) -> None:
        """Write down that the host waits, if this project's own code asked for it."""
        if _is_ours(frame := next(_frames())):
            self.waits.append(_said(frame))


@contextmanager
def pretended_gpu() -> Iterator[Record]:
    """Inside, runs and races of one process compute on a GPU that is pretended."""
    record, load, card = Record(), AutoModelForCausalLM.from_pretrained, SimpleNamespace(name="", total_memory=80 << 30)

    def from_pretrained(*arguments: Any, device_map: Any = None, **settings: Any) -> Any:  # it loads in threads
        return load(*arguments, **settings)

    with ExitStack() as stack:
        for name, pretended in (
            ("shearing.runs.context.resolve_device", lambda _: GPU),
            ("shearing.runs.stages.run.preflight", lambda *_, **__: SimpleNamespace(notes=())),  # computes nothing
            ("torch.cuda.get_device_properties", lambda _: card),
            ("torch.cuda.get_device_name", lambda *_: card.name),
            ("transformers.AutoModelForCausalLM.from_pretrained", from_pretrained),
        ):
            stack.enter_context(patch(name, pretended))
        for mode in (_Operations(record), _Calls(record)):
            stack.enter_context(mode)
        yield record


class _Operations(TorchDispatchMode):
    """What is computed of what: results of what is on the GPU are there too."""

    def __init__(self, record: Record) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        record, name = self._record, func.overloadpacket.__name__
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        there = [each for each in given if record.is_on_gpu(each)]
        here = [each for each in given if not record.is_on_gpu(each) and each.dim() and each.numel()]
        if name in _INDEXING:
            here = [each for each in here if each is args[0] or each.is_floating_point()]
        if there and here and name not in ("copy_", "_to_copy", "set_"):
            shapes = " and ".join(str([tuple(each.shape) for each in of]) for of in (here, there))
            record.mixes.append(f"{name} of {shapes}, {_said(next(filter(_is_ours, _frames()), None))}")
        fetched = name == "copy_" and there and there[0] is not args[0] and not (args[2:] and args[2])
        chosen = name in _INDEXING and any(each.dtype == torch.bool for each in there if each is not args[0])
        if fetched or chosen or (there and name in ("nonzero", "masked_select")):
            record.wait()
        known, result = {_storage(each) for each in given}, func(*args, **(kwargs or {}))
        for each in tree_leaves(result) if there else ():
            if isinstance(each, Tensor) and _storage(each) not in known:
                record.put(each, GPU)
        return result


class _Calls(TorchFunctionMode):
    """What code is told of devices, and which it asks for."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of: Any = args[0] if args else None
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        from_gpu = isinstance(of, Tensor) and self._record.is_on_gpu(of)
        if func in (_OWN_DEVICE, _IS_ON_GPU):
            return from_gpu if func == _IS_ON_GPU else GPU if from_gpu else func(of)
        if name in _READS and from_gpu:
            self._record.wait()
        asked = [*(args[1:] if name == "to" else ()), kwargs.get("device")]
        wanted = {"cpu": HOST, "cuda": GPU}.get(name) or next(filter(None, map(self._device, asked)), None)
        if wanted is None or wanted.type == "meta" or name == "_parse_to":
            return of.clone() if name == "pin_memory" else func(*args, **kwargs)
        if name == "to":
            args = tuple(HOST if isinstance(each, torch.device | str) else each for each in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = HOST
        result = of.clone() if name == "cuda" else func(*args, **kwargs)
        if isinstance(result, Tensor) and self._record.is_on_gpu(result) != (wanted != HOST):
            if from_gpu:
                self._record.wait()
            result = result.clone() if isinstance(of, Tensor) and _storage(result) == _storage(of) else result
            self._record.put(result, wanted)
        return result

    def _device(self, value: object) -> torch.device | None:
        """Which one an argument asks for; None: it says nothing of devices."""
        if isinstance(value, Tensor):
            return GPU if self._record.is_on_gpu(value) else value.device
        return torch.device(value) if isinstance(value, torch.device | str) else None


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _frames() -> Iterator[FrameType]:
    """Of the code that is pretended to, from the inmost."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__:
            yield frame
        frame = frame.f_back


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(f"{ROOT / 'shearing'}/")


def _said(frame: FrameType | None) -> str:
    return "" if frame is None else f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
