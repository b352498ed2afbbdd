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
        numbers: of the rows in the whole text.
    """

    batch: int
    inputs: Inputs
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
            shares.append(Share(number, batch.part(begin, stop), numbers))
        before += rows
    return shares


def steps_of(text: Sequence[Inputs], *, rows: int) -> list[list[Inputs]]:
    """The text in steps of so many rows, the last of which may have fewer: which rows are in one is not up to batches.

    A step comes in the pieces that the batches have of it, so none is larger than a batch.
    """
    steps: list[list[Inputs]] = []
    missing = 0  # rows of the last step
    for batch in text:
        first, count = 0, batch.tokens.shape[0]
        while first < count:
            if not missing:
                steps.append([])
                missing = rows
            end = min(count, first + missing)
            steps[-1].append(batch.part(first, end))
            missing -= end - first
            first = end
    return steps
