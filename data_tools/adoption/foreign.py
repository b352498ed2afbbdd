"""Where the documents of a tokenised set of another kind lie: which file, first token, number of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shearing.errors import ShearingError

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


def find_documents(path: Path, *, field: str) -> ForeignSet:
    """The documents of the tokenised set at `path`.

    Args:
        path: a `.ds` file or a folder of them, as datatrove and nanotron write them; or a folder that `save_to_disk`
            of `datasets` wrote, with a column `input_ids`.
        field: what the user calls it.

    Raises:
        ShearingError: it is neither, or damaged.
    """
    from data_tools.arrow_folder import arrow_files, find_in_arrow
    from data_tools.datatrove_files import datatrove_files, find_in_datatrove

    if files := datatrove_files(path):
        return find_in_datatrove(files)
    if files := arrow_files(path, field=field):
        return find_in_arrow(files)
    raise ShearingError(
        field,
        value=str(path),
        allowed="a .ds file or a folder of them (datatrove, nanotron), or a folder written by save_to_disk (datasets)",
        mend="correct the path" if not path.exists() else "prepare raw text with `shear data prepare`",
    )
