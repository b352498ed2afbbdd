"""Where the documents of a tokenised set of another kind lie: which file, first token, number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class ForeignFile:
    """A file with tokens of `dtype`; where each document begins and how long it is, in tokens, both int64 [documents].

    `firsts` counts from the beginning of the file, as if it held nothing but tokens.
    """

    path: Path
    dtype: str
    firsts: Counts
    lengths: Counts


@dataclass(frozen=True)
class ForeignSet:
    """A tokenised set: what kind, its files in order, and the name of its tokenizer where it says so."""

    kind: str
    files: tuple[ForeignFile, ...]
    tokenizer: str | None = None
