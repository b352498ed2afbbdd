"""Where there is no GPU for it, one message says so; where there is one, only kernels that work are used."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

from shearing.errors import ShearingError
from shearing.pruning.sparse.semi_structured import hardware
from shearing.pruning.sparse.semi_structured.hardware import converter, failure_of, find_hardware, relative_error
from shearing.pruning.sparse.semi_structured.layout import BACKENDS

CPU = torch.device("cpu")


def no_kernel(weight: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nand a page about it")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)


def test_torch_itself_refuses_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="not supported"):
        to_sparse_semi_structured(torch.zeros(64, 64, dtype=torch.bfloat16))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ShearingError, match="no GPU that torch can use") as raised:
        find_hardware()
    assert raised.value.field == "device"
    assert "compute capability 8.0 or later" in raised.value.allowed


@pytest.mark.parametrize("gpu", [(7, 5)], indirect=True)
def test_a_gpu_that_is_too_old(gpu: None) -> None:
    with pytest.raises(ShearingError, match=r"Some GPU, of compute capability 7\.5"):
        find_hardware()


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
def test_a_gpu_without_a_kernel(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "failure_of", lambda convert, device: failure_of(no_kernel, device=CPU))
    with pytest.raises(
        ShearingError,
        match=r"cusparselt: no kernel image is available; cutlass: no kernel image is available\)",
    ):
        find_hardware()


@pytest.mark.parametrize("gpu", [(9, 0)], indirect=True)
def test_backends_that_work_are_kept(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter(["architecture mismatch", None])
    monkeypatch.setattr(hardware, "failure_of", lambda convert, device: next(failures))
    found = find_hardware()
    assert (found.name, found.device, list(found.converters)) == ("Some GPU", torch.device("cuda", 0), ["cutlass"])


def test_a_kernel_is_tried() -> None:
    assert failure_of(lambda weight: weight, device=CPU) is None
    assert failure_of(no_kernel, device=CPU) == "no kernel image is available"
    failure = failure_of(lambda weight: weight * 1.5, device=CPU)
    assert failure is not None
    assert failure.startswith("wrong results, by 50")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("force_cutlass", [True, False])
def test_converting_leaves_torchs_own_choice_alone(
    backend: str, force_cutlass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseSemiStructuredTensor, "_FORCE_CUTLASS", force_cutlass)
    with pytest.raises(RuntimeError):
        converter(backend)(torch.zeros(64, 64, dtype=torch.bfloat16))
    assert force_cutlass == SparseSemiStructuredTensor._FORCE_CUTLASS


def test_errors_are_relative_and_of_what_is_not_finite_nan() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected=expected) == pytest.approx(0.1)
    assert torch.tensor(relative_error(torch.tensor([1.0, torch.nan]), expected=expected)).isnan()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_backends_multiply_as_dense_here() -> None:
    try:
        found = find_hardware()
    except ShearingError as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator) * torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(128)
    bias = torch.randn(256, generator=generator).to(found.device, torch.bfloat16)
    weight = weight.to(found.device, torch.bfloat16)
    for name, convert in found.converters.items():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            converted = convert(weight)
            assert isinstance(converted, BACKENDS[name])
            for tokens in (1, 7, 64):
                inputs = torch.randn(2, tokens, 512, generator=generator).to(found.device, torch.bfloat16)
                for with_bias in (None, bias):
                    expected = torch.nn.functional.linear(inputs, weight, with_bias)
                    got = torch.nn.functional.linear(inputs, converted, with_bias)
                    assert relative_error(got, expected=expected) < 0.01, (name, tokens)
