"""2:4 is told from what is not, to the row and the group; shapes are refused as torch refuses them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as compress,
    sparse_semi_structured_to_dense_cutlass as decompress,
)

from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.semi_structured.layout import (
    BACKENDS,
    Violation,
    first_violation,
    has_negative_zeros,
    misalignment,
    without_negative_zeros,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 17))
    values = st.sampled_from([0.0, -0.0, 1.0, -2.0])
    flat = draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(flat, dtype=draw(st.sampled_from(DTYPES))).view(rows, columns)


@given(matrices())
def test_the_first_violation_is_the_first(weight: Tensor) -> None:
    expected = None
    for row in reversed(range(weight.shape[0])):
        for first in reversed(range(0, weight.shape[1], 4)):
            count = int((weight[row, first : first + 4] != 0).sum())
            expected = Violation(row, first, count) if count > 2 else expected
    assert first_violation(weight) == expected


@given(matrices())
def test_zeros_become_positive_and_nothing_else_changes(weight: Tensor) -> None:
    before = weight.clone()
    cleaned = without_negative_zeros(weight)
    assert not has_negative_zeros(cleaned)
    assert torch.equal(cleaned, weight)
    assert has_negative_zeros(before) == any(
        value == 0 and str(value).startswith("-") for value in before.flatten().tolist()
    )


@pytest.mark.parametrize("pattern", [KeptOf(2, 4), KeptOf(1, 4), KeptOf(0, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_of_at_most_two_of_four_hold(pattern: KeptOf, dtype: torch.dtype) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert first_violation(weight * pattern.keep(weight.abs())) is None


def test_four_of_eight_is_not_two_of_four() -> None:
    weight = torch.zeros(3, 16)
    weight[2, 8:11] = 1
    assert first_violation(weight) == Violation(2, 8, 3)
    assert str(first_violation(weight)) == "row 2, inputs 8 to 11: 3 are not zero"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_passes_survives_compression(dtype: torch.dtype) -> None:
    """CUTLASS's format, which torch converts to on a CPU too; a third weight of a group would be lost in it."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = without_negative_zeros(weight * KeptOf(2, 4).keep(weight.abs()))
    assert torch.equal(decompress(*compress(weight)), weight)
    weight[5, 8:12] = 1
    assert first_violation(weight) == Violation(5, 8, 4)
    assert not torch.equal(decompress(*compress(weight)), weight)


@given(
    st.sampled_from(sorted(BACKENDS)),
    st.sampled_from([*DTYPES, torch.float64]),
    st.integers(1, 40).map(lambda k: 8 * k) | st.integers(1, 200),
    st.integers(1, 40).map(lambda k: 8 * k) | st.integers(1, 200),
)
def test_shapes_are_refused_where_torch_refuses_them(backend: str, dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = SimpleNamespace(
        is_cuda=True, dim=lambda: 2, is_contiguous=lambda: True, dtype=dtype, shape=torch.Size([rows, columns])
    )
    try:
        BACKENDS[backend]._validate_device_dim_dtype_shape(cast("Any", weight))
        accepted = True
    except RuntimeError:
        accepted = False
    assert (misalignment(rows=rows, columns=columns, backend=backend, dtype=dtype) is None) == accepted


def test_a_refusal_says_what_is_needed() -> None:
    assert misalignment(rows=32, columns=32, backend="cutlass", dtype=torch.bfloat16) == (
        "cutlass needs multiples of 32 outputs and 64 inputs"
    )
    assert misalignment(rows=32, columns=32, backend="cusparselt", dtype=torch.float32) == (
        "cusparselt has no kernel for float32"
    )
