"""Which rows of calibration text each process reads; what it finds is a sum over tokens, and sums are added up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shearing.data.documents import Inputs
from shearing.processes.processes import Processes


@dataclass(frozen=True)
class Share:
    """Rows of a batch that one process reads.

    Attributes:
        batch: the batch's number.
        inputs: the rows.
        of_batch: how much of the batch they are; 1.0 on one process.
        numbers: of the rows in the whole text.
    """

    batch: int
    inputs: Inputs
    of_batch: float
    numbers: range


def shares_of(text: Sequence[Inputs], *, processes: Processes) -> list[Share]:
    """Rows for the process that calls this, which follow upon each other; of each batch at most one share.

    Processes have equally many rows, up to one; so a process may have none.
    """
    total = sum(batch.tokens.shape[0] for batch in text)
    first, end = (total * (processes.rank + k) // processes.size for k in (0, 1))
    shares, before = [], 0
    for number, batch in enumerate(text):
        rows = batch.tokens.shape[0]
        begin, stop = max(first - before, 0), min(end - before, rows)
        if begin < stop:
            numbers = range(before + begin, before + stop)
            shares.append(Share(number, batch.part(begin, stop), (stop - begin) / rows, numbers))
        before += rows
    return shares


def rows_of_batch(batch: Inputs, *, processes: Processes) -> Inputs | None:
    """Rows for the process that calls this, of one batch that all of them work on; None: it has none."""
    rows = batch.tokens.shape[0]
    first, end = (rows * (processes.rank + k) // processes.size for k in (0, 1))
    return batch.part(first, end) if first < end else None
