"""Rows shared out over processes: each is somebody's, once, and nobody has many more than another."""

from __future__ import annotations

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.processes.processes import Processes
from shearing.pruning.calibration.shares import shares_of, steps_of


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_row_is_read_once_and_in_order(size: int) -> None:
    rows = torch.arange(5)[:, None].expand(5, 4)
    text = [Inputs(rows[:3]), Inputs(rows[3:])]
    everyone = [shares_of(text, processes=Processes(rank=rank, size=size)) for rank in range(size)]
    assert [int(row) for shares in everyone for share in shares for row in share.inputs.tokens[:, 0]] == list(range(5))
    counts = [sum(len(share.inputs.tokens) for share in shares) for shares in everyone]
    assert max(counts) - min(counts) <= 1
    if size == 1:
        assert [share.inputs for share in everyone[0]] == text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 10])
def test_steps_have_the_same_rows_whatever_the_batches_and_pieces_no_more_than_a_batch(size: int) -> None:
    text = [Inputs(rows[:, None]) for rows in torch.arange(10).split(size)]
    steps = steps_of(text, rows=4)
    rows = [[int(row) for piece in step for row in piece.tokens[:, 0]] for step in steps]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert max(len(piece.tokens) for step in steps for piece in step) == min(size, 4)
    if size == 4:
        assert [piece for step in steps for piece in step] == text
