"""Tokens as `save_to_disk` of `datasets` writes them: Arrow files with a column of lists, `input_ids`.

Values of such a column lie one after the other in each record batch, uncompressed, so a memory map of the file has
them as they are: only where they begin has to be found, once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.adoption.foreign import Counts, ForeignFile, ForeignSet
from shearing.errors import ShearingError

if TYPE_CHECKING:
    import pyarrow

COLUMN = "input_ids"
STATE_NAME = "state.json"
SUFFIX = ".arrow"


def arrow_files(path: Path, *, field: str) -> list[Path]:
    """The Arrow files of a folder, in the order of its rows; none for another kind of folder.

    Raises:
        ShearingError: it holds several data sets.
    """
    if (path / "dataset_dict.json").is_file():
        names = sorted(state.parent.name for state in path.glob(f"*/{STATE_NAME}"))
        raise ShearingError(
            field,
            value=f"{path}, which holds {len(names)} data sets",
            allowed="one of them",
            mend=f"name one: {', '.join(str(path / name) for name in names)}",
        )
    if (path / STATE_NAME).is_file():
        state = json.loads((path / STATE_NAME).read_text())
        return [path / file["filename"] for file in state["_data_files"]]
    if path.is_dir():
        return sorted(path.glob(f"*{SUFFIX}"))
    return [path] if path.suffix == SUFFIX and path.is_file() else []


def find_in_arrow(files: list[Path]) -> ForeignSet:
    """The documents of Arrow files: each row is one.

    Raises:
        ShearingError: pyarrow is not installed, or a file has no column of whole numbers `input_ids`.
    """
    return ForeignSet("datasets", tuple(_file(path) for path in files))


def _file(path: Path) -> ForeignFile:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ShearingError(
            "pyarrow", value="not installed", allowed="a version for data sets", mend="pip install 'shearing[data]'"
        ) from error
    try:
        content = pa.memory_map(str(path)).read_buffer()
        parts = [_batch(batch, content=content) for batch in _batches(content)]
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise ShearingError(
            str(path),
            value=str(error),
            allowed=f"an uncompressed Arrow file with a column {COLUMN} of lists of whole numbers",
            mend=f"save the tokenised data set with save_to_disk, its tokens in a column {COLUMN}",
        ) from error
    dtypes = {dtype for dtype, _, _ in parts}
    empty = np.empty(0, dtype=np.int64)
    return ForeignFile(
        path,
        dtypes.pop() if dtypes else "<i8",
        np.concatenate([empty, *(firsts for _, firsts, _ in parts)]),
        np.concatenate([empty, *(lengths for _, _, lengths in parts)]),
    )


def _batches(content: pyarrow.Buffer) -> Iterator[pyarrow.RecordBatch]:
    import pyarrow as pa

    try:
        yield from pa.ipc.open_stream(content)
    except pa.ArrowInvalid:
        # The other of the two layouts of Arrow on disk, which other programs write.
        reader = pa.ipc.open_file(content)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _batch(batch: pyarrow.RecordBatch, *, content: pyarrow.Buffer) -> tuple[str, Counts, Counts]:
    """Type of the tokens in a batch, first token and length of each row."""
    import pyarrow as pa

    if COLUMN not in batch.schema.names:
        raise KeyError(f"columns {', '.join(batch.schema.names)}")
    lists: Any = batch.column(COLUMN)
    kind = lists.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise TypeError(f"{COLUMN} holds {kind}")
    values = lists.values
    if not pa.types.is_integer(values.type) or values.null_count:
        raise TypeError(f"{COLUMN} holds {kind}" + (", with gaps" if values.null_count else ""))
    dtype = np.dtype(values.type.to_pandas_dtype()).newbyteorder("<")
    if pa.types.is_fixed_size_list(kind):
        bounds = np.arange(len(lists) + 1, dtype=np.int64) * kind.list_size
    else:
        bounds = lists.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    buffer = values.buffers()[1]
    address = (buffer.address if buffer is not None else content.address) + values.offset * dtype.itemsize
    start, rest = divmod(address - content.address, dtype.itemsize)
    if rest or not 0 <= start <= content.size // dtype.itemsize - len(values):
        raise TypeError("compressed values")
    lengths = np.diff(bounds)
    if lists.null_count:
        lengths = np.where(lists.is_null().to_numpy(zero_copy_only=False), 0, lengths)
    return dtype.str, start + bounds[:-1], lengths
