"""Documents out of Parquet and Arrow: a column of text, however it is encoded, or of lists of messages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, BinaryIO

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import Text, TextFile

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_BATCH = 256


def parquet_texts(opened: Callable[[], BinaryIO], *, source: TextFile, bad: BadInput) -> Iterator[Text]:
    """All documents of a Parquet file, in order; only their column is read.

    Args:
        opened: the file, anew: it is read here and there.
        source: what it is.
        bad: takes what cannot be read.

    Raises:
        ShearingError: bad input, unless it is to be skipped.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    with contextlib.closing(opened()) as stream:
        try:
            with pq.ParquetFile(stream, pre_buffer=False) as file:
                path = _path_of(file.schema_arrow, source.field)
                if path is None:
                    source.no_field(_names(file.schema_arrow), like=_row_like(file.schema_arrow), bad=bad)
                    return
                for group in range(file.num_row_groups):
                    # By row group: a batch over two has two dictionaries, which pyarrow cannot read inside of structs.
                    # A name chooses all columns below it, so where one has a dot in its name too much may come.
                    batches = file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=[source.field])
                    for batch in batches:
                        yield from _texts(_column(batch, path), source=source, first_row=row, bad=bad)
                        row += len(batch)
        except (pa.ArrowException, OSError) as error:
            bad.damaged(error, place=f"{source.path}, row {row}")


def arrow_texts(file: BinaryIO, *, source: TextFile, bad: BadInput) -> Iterator[Text]:
    """All documents of a stream of Arrow, as `datasets` keeps them, in order; see `parquet_texts`."""
    import pyarrow as pa

    row = 0
    try:
        with pa.ipc.open_stream(file) as batches:
            path = _path_of(batches.schema, source.field)
            if path is None:
                source.no_field(_names(batches.schema), like=_row_like(batches.schema), bad=bad)
                return
            for batch in batches:
                yield from _texts(_column(batch, path), source=source, first_row=row, bad=bad)
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        bad.damaged(error, place=f"{source.path}, row {row}")


def _path_of(schema: pa.Schema, name: str) -> list[str] | None:
    """The column, and the fields of structs below it, that a dotted name means; None if there are none."""
    import pyarrow as pa

    fields = {field.name: field.type for field in schema}
    path, rest = [], name
    while rest not in fields:
        first, dot, rest = rest.partition(".")
        if not dot or first not in fields or not pa.types.is_struct(fields[first]):
            return None
        path.append(first)
        fields = {field.name: field.type for field in fields[first]}
    return [*path, rest]


def _names(schema: pa.Schema) -> list[str]:
    import pyarrow as pa

    def below(field: Any, before: str) -> Iterator[str]:
        if pa.types.is_struct(field.type):
            for inner in field.type:
                yield from below(inner, f"{before}{field.name}.")
        else:
            yield f"{before}{field.name}"

    return [name for field in schema for name in below(field, "")]


def _row_like(schema: pa.Schema) -> dict[str, Any]:
    return {field.name: _value_like(field.type) for field in schema}


def _value_like(kind: pa.DataType) -> Any:
    """The least value of the form of a list of objects, with nothing in it; None for values of another form."""
    import pyarrow as pa

    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list and pa.types.is_struct(kind.value_type):
        return [{field.name: None for field in kind.value_type}]
    return None


def _column(batch: pa.RecordBatch, path: list[str]) -> Any:
    """The column at the end of a path; null wherever a struct above it is."""
    import pyarrow.compute as pc

    column = batch.column(batch.schema.get_field_index(path[0]))
    return pc.struct_field(column, path[1:]) if path[1:] else column


def _texts(column: Any, *, source: TextFile, first_row: int, bad: BadInput) -> Iterator[Text]:
    """Texts of one column of a batch; rows count from 0."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if source.chat is not None:
        values = (value.as_py() for value in column)
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        # As bytes: Arrow does not check on its own that strings are UTF-8.
        values = iter(column.cast(pa.large_binary()).to_pylist())
    elif pa.types.is_string_view(column.type):
        values = iter(column.cast(pa.binary_view()).cast(pa.large_binary()).to_pylist())
    else:
        place = f"{source.path}, rows {first_row} to {first_row + len(column) - 1}"
        for _ in range(len(column)):
            source.no_string(str(column.type), like=_value_like(column.type), place=place, bad=bad)
        return
    for row in range(first_row, first_row + len(column)):
        place = f"{source.path}, row {row}"
        try:
            value = next(values)
            text = value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            bad.not_utf8(error, place=place)
            continue
        if value is None:
            bad.no_text(place=place, text_field=source.field, found=f"null in the field {source.field!r}")
        elif isinstance(value, bytes) and len(value) > bad.max_document_bytes:
            bad.too_long(place=place)
        elif (taken := source.text_of_value(text, place=place, bad=bad)) is not None:
            yield Text(taken, place)
