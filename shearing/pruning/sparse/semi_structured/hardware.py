"""Whether this machine has a GPU and kernels for 2:4 matrices, and what they are reached through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from shearing.errors import ShearingError
from shearing.pruning.sparse.semi_structured.layout import BACKENDS

CAPABILITY = (8, 0)
"""The first compute capability with sparse tensor cores (NVIDIA Ampere)."""

TOLERANCES: Mapping[torch.dtype, float] = {torch.bfloat16: 0.01, torch.float16: 0.002}
"""Largest relative error (Frobenius norms) between two kernels' results: a few times what one rounding costs."""


@dataclass(frozen=True)
class Hardware:
    """A device that multiplies 2:4 matrices.

    Attributes:
        device: where.
        name: of the product.
        converters: backend -> what makes of a dense 2:4 weight [O, I] on the device one that its kernels multiply.
        stopwatch: seconds that the device needs for the work that a call starts.
    """

    device: torch.device
    name: str
    converters: Mapping[str, Callable[[Tensor], Tensor]]
    stopwatch: Callable[[Callable[[], object]], float]


def find_hardware(*, backend: str = "auto") -> Hardware:
    """The GPU of this process, with every backend that gives right results on it.

    Args:
        backend: a key of `BACKENDS`, or auto: all that work.

    Raises:
        ShearingError: no CUDA GPU, one that is too old, or no backend that works on it.
    """
    if not torch.cuda.is_available():
        raise _unsupported("no GPU that torch can use", backend=backend)
    device = torch.device("cuda", torch.cuda.current_device())
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise _unsupported(f"{name}, of compute capability {capability[0]}.{capability[1]}", backend=backend)
    names = list(BACKENDS) if backend == "auto" else [backend]
    failures = {candidate: failure_of(converter(candidate), device=device) for candidate in names}
    working = {candidate: converter(candidate) for candidate, failure in failures.items() if failure is None}
    if not working:
        reasons = "; ".join(f"{candidate}: {failure}" for candidate, failure in failures.items())
        raise _unsupported(f"{name}, where no kernel works ({reasons})", backend=backend)
    return Hardware(device, name, working, cuda_seconds)


def converter(backend: str) -> Callable[[Tensor], Tensor]:
    """`torch.sparse.to_sparse_semi_structured` with the kernels of one backend."""

    def convert(weight: Tensor) -> Tensor:
        with _chosen(backend):
            converted: Tensor = to_sparse_semi_structured(weight)
        return converted

    return convert


def failure_of(convert: Callable[[Tensor], Tensor], *, device: torch.device) -> str | None:
    """Why a small 2:4 product does not come out right on a device; None if it does."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 128, generator=generator) * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(32)
    weight, inputs = weight.to(device, torch.bfloat16), torch.randn(1, 16, 128, generator=generator)
    inputs = inputs.to(device, torch.bfloat16)
    try:
        with torch.no_grad():
            error = relative_error(linear(inputs, convert(weight)), expected=linear(inputs, weight))
    except (RuntimeError, ImportError, AttributeError) as failure:
        return str(failure).splitlines()[0]
    return None if error <= TOLERANCES[torch.bfloat16] else f"wrong results, by {100 * error:.3g} %"


def relative_error(found: Tensor, *, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in fp32, of any shape; NaN if either is not finite."""
    found, expected = found.float(), expected.float()
    return float((found - expected).norm() / expected.norm())


def cuda_seconds(work: Callable[[], object]) -> float:
    """Seconds between two CUDA events around what a call starts, on an idle GPU: waiting for Python counts."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


@contextmanager
def _chosen(backend: str) -> Iterator[None]:
    """Make torch convert for this backend, without its notice that the interface is a prototype."""
    before = SparseSemiStructuredTensor._FORCE_CUTLASS  # noqa: SLF001 (what torch's own tutorial sets)
    SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "cutlass"  # noqa: SLF001
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*prototype", category=UserWarning)
            yield
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = before  # noqa: SLF001


def _unsupported(found: str, *, backend: str) -> ShearingError:
    kernels: Sequence[str] = list(BACKENDS) if backend == "auto" else [backend]
    return ShearingError(
        "device",
        value=found,
        allowed=f"a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or later on which torch multiplies 2:4 "
        f"matrices ({' or '.join(kernels)})",
        mend="run this on the machine that will run the model; anywhere else the zeros gain no time, and the sparse "
        "model is to be used as it is",
    )
