"""Rows shared out over processes: each is somebody's, once, and nobody has many more than another."""

from __future__ import annotations

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.processes.processes import Processes
from shearing.pruning.calibration.shares import rows_of_batch, shares_of


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_every_row_is_read_once_and_in_order(size: int) -> None:
    rows = torch.arange(5)[:, None].expand(5, 4)
    text = [Inputs(rows[:3]), Inputs(rows[3:])]
    everyone = [shares_of(text, processes=Processes(rank=rank, size=size)) for rank in range(size)]
    assert [int(row) for shares in everyone for share in shares for row in share.inputs.tokens[:, 0]] == list(range(5))
    counts = [sum(len(share.inputs.tokens) for share in shares) for shares in everyone]
    assert max(counts) - min(counts) <= 1
    parts = [share for shares in everyone for share in shares]
    for batch in (0, 1):
        assert sum(share.of_batch for share in parts if share.batch == batch) == pytest.approx(1)
    if size == 1:
        assert [share.inputs for share in everyone[0]] == text


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_batch_that_all_work_on_is_cut_up(size: int) -> None:
    batch = Inputs(torch.arange(3)[:, None])
    parts = [rows_of_batch(batch, processes=Processes(rank=rank, size=size)) for rank in range(size)]
    assert torch.equal(torch.cat([part.tokens for part in parts if part is not None]), batch.tokens)
    assert sum(part is None for part in parts) == max(0, size - 3)
