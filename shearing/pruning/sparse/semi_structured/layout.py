"""What 2:4 kernels take: at most 2 of each 4 consecutive inputs, no negative zeros, shapes in whole tiles.

Legend: O outputs (rows), I inputs (columns) of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

GROUP, MOST = 4, 2
BACKENDS = {"cusparselt": SparseSemiStructuredTensorCUSPARSELT, "cutlass": SparseSemiStructuredTensorCUTLASS}
"""Name of a library of kernels -> torch's class for it, in the order of preference between equals."""


@dataclass(frozen=True)
class Violation:
    """The first group of a matrix that is not 2:4.

    Attributes:
        row: its row.
        first: the first of its inputs.
        count: how many of its weights are not zero.
    """

    row: int
    first: int
    count: int

    def __str__(self) -> str:
        return f"row {self.row}, inputs {self.first} to {self.first + GROUP - 1}: {self.count} are not zero"


def first_violation(weight: Tensor) -> Violation | None:
    """The first group of 4 consecutive inputs with more than 2 weights that are not zero; None if there is none.

    What is left over where 4 does not divide the inputs is a group too; such a matrix has no aligned shape.

    Args:
        weight: [O, I].
    """
    groups = torch.nn.functional.pad(weight.ne(0), (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    counts = groups.sum(-1, dtype=torch.uint8)
    wrong = counts > MOST
    if not bool(wrong.any()):
        return None
    place = int(wrong.flatten().to(torch.uint8).argmax())
    row, group = divmod(place, counts.shape[1])
    return Violation(row, GROUP * group, int(counts[row, group]))


def has_negative_zeros(weight: Tensor) -> bool:
    """Whether any zero has its sign set."""
    return bool((weight.eq(0) & weight.signbit()).any())


def without_negative_zeros(weight: Tensor) -> Tensor:
    """The same matrix, every zero positive: all of its bits are 0, for kernels that look at nothing else."""
    return weight.masked_fill(weight.eq(0), 0)


def misalignment(*, rows: int, columns: int, backend: str, dtype: torch.dtype) -> str | None:
    """What a backend lacks for a shape or a dtype, in words; None if it takes it.

    The figures are those by which the installed torch refuses to convert.

    Args:
        rows, columns: O and I.
        backend: a key of `BACKENDS`.
        dtype: of weights and activations.
    """
    tiles = BACKENDS[backend]._DTYPE_SHAPE_CONSTRAINTS.get(dtype)  # noqa: SLF001 (nowhere public)
    if tiles is None:
        return f"{backend} has no kernel for {str(dtype).removeprefix('torch.')}"
    if rows % tiles.sparse_min_rows or columns % tiles.sparse_min_cols:
        return f"{backend} needs multiples of {tiles.sparse_min_rows} outputs and {tiles.sparse_min_cols} inputs"
    return None
