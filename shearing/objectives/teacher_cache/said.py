"""What is kept of a teacher's distributions for the tokens of a row; and the gradient that comes of so few numbers.

Shapes: S positions, K tokens of the vocabulary that are kept of each, C tokens of a chunk, V vocabulary. p is the
teacher's distribution, q the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Said(NamedTuple):
    """Of one row, on the host; all at temperature 1.

    Attributes:
        label_losses: [S], -log p[label], in nats.
        entropies: [S], of p, in nats.
        ids: [S, K], tokens of the vocabulary.
        values: [S, K], what is kept of each, as its form says; 0 where a position has fewer.
        rest: [S], what is kept of all others together, as its form says.
    """

    label_losses: Floats
    entropies: Floats
    ids: Ids
    values: Floats
    rest: Floats


def stacked(rows: Sequence[Said]) -> Said:
    """Rows one after the other: of all B * S positions; as many of each are kept as of the one with most."""
    width = max(row.ids.shape[1] for row in rows)

    def padded(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.pad(array, ((0, 0), (0, width - array.shape[1])))

    return Said(
        np.concatenate([row.label_losses for row in rows]),
        np.concatenate([row.entropies for row in rows]),
        np.concatenate([padded(row.ids) for row in rows]),
        np.concatenate([padded(row.values) for row in rows]),
        np.concatenate([row.rest for row in rows]),
    )
