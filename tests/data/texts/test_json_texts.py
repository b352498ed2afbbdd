"""JSON in every layout that people have: what Python's own reader finds, in its order, with the line it begins on."""

from __future__ import annotations

import gzip
import json
from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, strategies as st

from shearing.data.texts import json_texts as module
from shearing.data.texts.bad_input import BadInput
from shearing.data.texts.documents import MISSING, TextFile, value_at
from shearing.data.texts.json_texts import json_texts
from shearing.data.texts.kinds import kind_of
from shearing.data.texts.reading import read_local_texts
from shearing.errors import ShearingError

FILE = TextFile("a.json", "json", "text")
RECORDS = [
    {"text": "plain", "id": 1},
    {"text": 'quotes " and \\ and ] and }', "tags": ["a", {"b": [1, 2]}]},
    {"text": "lines\nand\ttabs", "score": -1.5e-7, "none": None},
    {"text": "München 東京 🙂", "nested": {"text": "inner"}},
    {"text": ""},
]
TEXTS = [record["text"] for record in RECORDS]


def bad_of(policy: Any = "stop", *, limit: int = 10**6) -> BadInput:
    return BadInput(policy, limit, " OR SKIP")


def read(data: bytes, *, source: TextFile = FILE, bad: BadInput | None = None) -> list[tuple[str, str]]:
    return [tuple(each) for each in json_texts(BytesIO(data), source=source, bad=bad or bad_of())]


LAYOUTS = {
    "an array of one line": orjson.dumps(RECORDS),
    "an array with a line each": b"[\n" + b",\n".join(map(orjson.dumps, RECORDS)) + b"\n]\n",
    "a pretty array": orjson.dumps(RECORDS, option=orjson.OPT_INDENT_2),
    "pretty objects": b"\n".join(orjson.dumps(record, option=orjson.OPT_INDENT_2) for record in RECORDS),
    "pretty as Python writes it": "\n".join(json.dumps(record, indent=4) for record in RECORDS).encode(),
    "lines": b"\n".join(map(orjson.dumps, RECORDS)),
    "objects without a space between": b"\n{" + b"".join(map(orjson.dumps, RECORDS))[1:],
    "arrays one after the other": orjson.dumps(RECORDS[:2]) + b"\n" + orjson.dumps(RECORDS[2:]),
    "a byte order mark": b"\xef\xbb\xbf" + orjson.dumps(RECORDS, option=orjson.OPT_INDENT_2),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_documents(layout: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", chunk)
    assert [text for text, _ in read(LAYOUTS[layout])] == TEXTS


def test_places_are_lines() -> None:
    data = orjson.dumps(RECORDS, option=orjson.OPT_INDENT_2)
    lines = data.decode().split("\n")
    for record, (_, place) in zip(RECORDS, read(data), strict=True):
        number = int(place.removeprefix("a.json:"))
        assert lines[number - 1].strip() == "{"
        assert json.dumps(record["text"], ensure_ascii=False) in lines[number]


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text(max_size=30) | st.integers() | st.none(), max_size=3)),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(1, 9),
)
def test_values_are_those_of_pythons_reader(
    records: list[dict[str, Any]], indent: int | None, ascii_only: bool, chunk: int
) -> None:
    records = [{**record, "text": f"{number} {record}"} for number, record in enumerate(records)]
    data = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode(errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_BYTES", chunk)
        assert [text for text, _ in read(data)] == [record["text"] for record in json.loads(data)]


BROKEN = {
    "a comma is missing": (b'[\n{"text": "a"},\n{"text": "b" "c": 1},\n' + b" " * 50 + b"]", "a.json:3", "delimiter"),
    "cut off": (b'[\n{"text": "a"},\n{"text": "b", "c', "a.json:3", "Unterminated string"),
    "not closed": (b'[\n{"text": "a"}', "a.json:2", "the array is not closed"),
    "no JSON": (b"[\nhello " + b"x" * 50 + b"]", "a.json:2", "Expecting value"),
    "not UTF-8": (b'[{"text": "a"},\n{"text": "caf\xe9"}]', "a.json", "byte 0xe9"),
    "deep": (b"[" + b'{"a": ' * 100_000, "a.json:1", "recursion"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_json_says_where_or_is_counted_and_ends_the_file(case: str) -> None:
    data, place, message = BROKEN[case]
    with pytest.raises(ShearingError) as stopped:
        read(data)
    assert str(stopped.value).startswith(place)
    assert message in str(stopped.value)
    bad = bad_of("skip")
    found = [text for text, _ in read(data, bad=bad)]
    assert found in ([], ["a"])
    assert sum(bad.left_out.values()) == 1


def test_values_of_other_kinds_are_counted_one_by_one() -> None:
    bad = bad_of("skip")
    data = b'[1, {"text": "a"}, "b", {"text": 3}, {"body": "c"}, [2], {"text": "d"}]'
    assert [text for text, _ in read(data, bad=bad)] == ["a", "d"]
    assert bad.left_out == {"no_text": 5}


@pytest.mark.parametrize(
    ("record", "mend"),
    [
        ({"messages": [{"role": "user", "content": ""}]}, "'messages' holds chats: `shear data prepare --format chat`"),
        (
            {"id": 1, "talk": [{"from": "human", "value": "a"}]},
            "rename from and value to role and content, then `shear data prepare --format chat --text-field talk`",
        ),
        ({"text": [{"role": "user", "content": "a"}]}, "`shear data prepare --format chat --text-field text`"),
        ({"body": "a", "tags": ["b"], "none": []}, "name the field that holds the text: text_field"),
    ],
)
def test_chats_in_place_of_text_say_how_chats_are_read(record: dict[str, Any], mend: str) -> None:
    with pytest.raises(ShearingError) as error:
        read(orjson.dumps(record))
    assert mend in error.value.mend


@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.JSONL.GZ"])
def test_a_plain_file_that_is_called_compressed(name: str, tmp_path: Path) -> None:
    path, (kind, compression) = tmp_path / name, kind_of(name) or ("text", None)
    source = TextFile(str(path), kind, "text", compression)
    lines = orjson.dumps({"text": "a"})
    path.write_bytes(gzip.compress(lines))
    assert [text for text, _ in read_local_texts(source, bad=bad_of())] == ["a"]
    path.write_bytes(lines)
    with pytest.raises(ShearingError, match=r"it is not compressed with gzip: name it without \.gz"):
        list(read_local_texts(source, bad=bad_of()))
    bad = bad_of("skip")
    assert list(read_local_texts(source, bad=bad)) == []
    assert bad.left_out == {"damaged": 1}
    path.write_bytes(gzip.compress(lines) + lines)
    with pytest.raises(ShearingError, match="cut off or damaged"):
        list(read_local_texts(source, bad=bad_of()))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READ_BYTES", 10)
    long = orjson.dumps([{"text": "a"}, {"text": "x" * 500}, {"text": "b"}])
    bad = bad_of("skip", limit=100)
    assert [text for text, _ in read(long, bad=bad)] == ["a"]
    assert bad.left_out == {"too_long": 1}
    # A document that is too long in a value that is not: what comes after it is read.
    bad = bad_of("skip", limit=99)
    monkeypatch.setattr(module, "READ_BYTES", 1000)
    assert [text for text, _ in read(orjson.dumps([{"text": "é" * 70}, {"text": "b"}]), bad=bad)] == ["b"]

    class Endless:
        read_bytes = 0

        def readline(self, _: int) -> bytes:
            return b'[{"text": "'

        def read(self, count: int) -> bytes:
            self.read_bytes += count
            return b"x" * count

    endless = Endless()
    with pytest.raises(ShearingError, match="more than 5000 bytes"):
        list(json_texts(endless, source=FILE, bad=bad_of(limit=5000)))  # type: ignore[arg-type]
    assert endless.read_bytes < 20_000


def test_a_broken_line_of_a_file_of_lines_costs_that_line() -> None:
    for first in (b'{"text": "a"}', b'{"text": "cut', b'{"text" "a"}', b"hello"):
        bad = bad_of("skip")
        found = [text for text, _ in read(first + b'\n{"text": "b"}\n{"tex\n{"text": "c"}', bad=bad)]
        assert found[-2:] == ["b", "c"]
        assert bad.left_out["bad_json"] == (1 if first.endswith(b'"a"}') and b":" in first else 2)


def test_lines_are_never_taken_for_values() -> None:
    with pytest.raises(ShearingError, match=r"a\.json:1"):
        read(b'{\n"text": "a"\n}', source=TextFile("a.json", "lines", "text"))


def test_fields_inside_of_fields(tmp_path: Path) -> None:
    record = {"data": {"text": "deep", "more": {"text": "deeper"}}, "data.flat": "dotted", "text": "top"}
    assert value_at(record, "data.text") == "deep"
    assert value_at(record, "data.more.text") == "deeper"
    assert value_at(record, "data.flat") == "dotted"
    for missing in ("data.none", "text.data", "none.text", "data.text.x", ""):
        assert value_at(record, missing) is MISSING
    for name, kind, data in (("a.jsonl", "lines", orjson.dumps(record)), ("a.json", "json", orjson.dumps([record]))):
        (tmp_path / name).write_bytes(data)
        source = TextFile(str(tmp_path / name), kind, "data.more.text")  # type: ignore[arg-type]
        assert [text for text, _ in read_local_texts(source, bad=bad_of())] == ["deeper"]
    with pytest.raises(ShearingError, match=r"fields 'data\.text', 'data\.more\.text', 'data\.flat', 'text'"):
        read(orjson.dumps([record]), source=TextFile("a.json", "json", "data.body"))
