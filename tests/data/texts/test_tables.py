"""Columns of Parquet and Arrow in every encoding that pyarrow writes, and inside of structs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import TextFile
from shearing.data.texts.reading import read_local_texts
from shearing.data.texts.tables import ROWS_PER_BATCH
from shearing.errors import ShearingError

TEXTS = [f"text {number % 7} é 東京" for number in range(ROWS_PER_BATCH + 44)]
ENCODINGS: dict[str, Any] = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
    "dictionary of large strings": pa.dictionary(pa.int8(), pa.large_string()),
}


def written(folder: Path, kind: str, table: pa.Table) -> Path:
    path = folder / f"a.{kind}"
    if kind == "parquet":
        views = any("string_view" in str(field.type) for field in table.schema)  # which pyarrow cannot slice to write
        pq.write_table(table, path, row_group_size=None if views else 100)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=100)
    return path


def read(path: Path, field: str, *, policy: Any = "stop") -> tuple[list[str], dict[str, int]]:
    bad = BadInput(policy, 10**6)
    source = TextFile(str(path), path.suffix[1:], field)  # type: ignore[arg-type]
    return [text for text, _ in read_local_texts(source, bad=bad)], dict(bad.left_out)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_of_a_column(kind: str, encoding: str, tmp_path: Path) -> None:
    column = pa.array([*TEXTS[:5], None, *TEXTS[5:]]).cast(ENCODINGS[encoding])
    path = written(tmp_path, kind, pa.table({"id": range(len(column)), "text": column}))
    if kind == "parquet" and "dictionary" in encoding:
        assert pa.types.is_dictionary(pq.read_schema(path).field("text").type)
    assert read(path, "text", policy="skip") == (TEXTS, {"no_text": 1})
    with pytest.raises(ShearingError, match="row 5"):
        read(path, "text")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_fields_of_structs(kind: str, encoding: str, tmp_path: Path) -> None:
    inner = pa.StructArray.from_arrays([pa.array(TEXTS).cast(ENCODINGS[encoding]), pa.array(TEXTS)], ["text", "other"])
    gone = pa.array([row == 3 for row in range(len(TEXTS))])
    outer = pa.StructArray.from_arrays([inner, pa.array(range(len(TEXTS)))], ["data", "id"], mask=gone)
    path = written(tmp_path, kind, pa.table({"row": outer, "text": pa.array(TEXTS[::-1])}))
    assert read(path, "row.data.text", policy="skip") == (TEXTS[:3] + TEXTS[4:], {"no_text": 1})
    assert read(path, "text")[0] == TEXTS[::-1]
    for missing in ("row.text", "data.text", "row.data.text.x", "none"):
        with pytest.raises(ShearingError, match=r"'row\.data\.text', 'row\.data\.other', 'row\.id', 'text'"):
            read(path, missing)
    with pytest.raises(ShearingError, match="struct"):
        read(path, "row.data")


def test_a_column_with_a_dot_in_its_name(tmp_path: Path) -> None:
    table = pa.table({"data.text": pa.array(["flat", "names"]), "data": pa.array([{"body": "a"}, {"body": "b"}])})
    assert read(written(tmp_path, "parquet", table), "data.text")[0] == ["flat", "names"]


def test_what_is_not_utf8_in_a_dictionary(tmp_path: Path) -> None:
    broken = pa.array([b"good", b"caf\xe9", b"fine"]).view(pa.string())
    dictionary = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 0]), broken)
    path = written(tmp_path, "arrow", pa.table({"text": dictionary}))
    assert read(path, "text", policy="skip") == (["good", "fine", "good"], {"not_utf8": 1})


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("field", ["text", "talk"])
def test_chats_in_place_of_text_say_how_chats_are_read(kind: str, field: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind, pa.table({"talk": [[{"from": "human", "value": "a"}]], "n": [1]}))
    mend = "'talk' holds chats: rename from and value to role and content, then `shear data prepare --format chat"
    with pytest.raises(ShearingError, match=mend):
        read(path, field)
