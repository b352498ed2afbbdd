"""Summing gradients over processes while the backward pass still runs.

DistributedDataParallel does this too, but lays its buckets out anew after the first backward pass of a process, and
with three processes or more the order in which a sum is rounded follows the layout: a resumed run would differ from the
uninterrupted one in the last bits. Here the layout depends on the parameters alone.

Legend: p parameters in the order in which the backward pass is expected to reach them, the last ones first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 8 << 20
"""32 MB in fp32: large enough for full bandwidth, small enough that most of them travel during the backward pass."""


@dataclass
class _Bucket:
    parameters: list[nn.Parameter]
    waiting: int = 0
    flat: Tensor | None = None
    work: Any = None


@dataclass
class GradientSum:
    """All-reduces gradients bucket by bucket; `armed` for the last micro-batch of a step, then `finish`.

    Args:
        parameters: those that are trained, in the model's order.
    """

    parameters: Sequence[nn.Parameter]
    armed: bool = False
    _buckets: list[_Bucket] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = _BUCKET_ELEMENTS
        for parameter in reversed(self.parameters):
            if size >= _BUCKET_ELEMENTS:
                self._buckets.append(_Bucket([]))
                size = 0
            bucket = self._buckets[-1]
            bucket.parameters.append(parameter)
            size += parameter.numel()
            hook = parameter.register_post_accumulate_grad_hook(lambda _, bucket=bucket: self._ready(bucket))
            self._hooks.append(hook)
        self._reset()

    def finish(self) -> None:
        """Wait for all buckets; every parameter's gradient is then the sum over processes."""
        for bucket in self._buckets:
            if bucket.work is None:
                self._send(bucket)  # a parameter that this step's loss does not depend on
            bucket.work.wait()
            assert bucket.flat is not None
            sizes = [parameter.numel() for parameter in bucket.parameters]
            for parameter, part in zip(bucket.parameters, bucket.flat.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
        self._reset()

    def close(self) -> None:
        """Let go of parameters and buckets."""
        for hook in self._hooks:
            hook.remove()
        self.parameters, self._buckets, self._hooks = (), [], []

    def _ready(self, bucket: _Bucket) -> None:
        if not self.armed:
            return
        bucket.waiting -= 1
        if bucket.waiting == 0:
            self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        bucket.flat = torch.cat(
            [
                torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
                for parameter in bucket.parameters
            ]
        )
        for parameter in bucket.parameters:
            parameter.grad = None
        bucket.work = dist.all_reduce(bucket.flat, async_op=True)

    def _reset(self) -> None:
        self.armed = False
        for bucket in self._buckets:
            bucket.waiting, bucket.flat, bucket.work = len(bucket.parameters), None, None


def sum_in_one_exchange(parameters: Sequence[Tensor], *, scale: float) -> None:
    """Add up over processes the gradients of a few small tensors that no engine holds, in one exchange.

    Args:
        parameters: those without a gradient are left out.
        scale: factor that the engine put on losses, and so on these gradients.
    """
    graded = [parameter for parameter in parameters if parameter.grad is not None]
    if not graded or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    flat = torch.cat([parameter.grad.flatten() for parameter in graded if parameter.grad is not None])
    dist.all_reduce(flat)
    flat /= scale
    for parameter, part in zip(graded, flat.split([each.numel() for each in graded]), strict=True):
        parameter.grad = part.view_as(parameter)
