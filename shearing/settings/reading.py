"""Reading a recipe file: YAML, then dotted overrides, remembering where each value was written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from shearing.errors import ShearingError

KeyPath = tuple[str | int, ...]

_ONE_WORD = re.compile(r"[A-Za-z_]\w*:\S+")


class _Loader(yaml.SafeLoader):
    """The safe one, that also names the line of what looks like a date or a number and is none: 2024-02-30."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except ValueError as error:
            raise yaml.constructor.ConstructorError(problem=str(error), problem_mark=node.start_mark) from None


class Places:
    """Where the values of a recipe were written: `file:line`, or the text of the override."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._lines: dict[KeyPath, int] = {}
        self._overrides: dict[KeyPath, str] = {}

    def set_line(self, path: KeyPath, *, line: int) -> None:
        """Remember that `path` was written at `line` (from 1) of the file."""
        self._lines[path] = line

    def set_override(self, path: KeyPath, *, text: str) -> None:
        """Remember that `path` was set by an override; the last one counts."""
        self._overrides[path] = text

    def of(self, path: KeyPath) -> str:
        """The override that set `path`, a part of it or all around it; else its line, or that of the key above it."""
        for known, text in reversed(self._overrides.items()):
            shared = min(len(known), len(path))
            if known[:shared] == path[:shared]:
                return f"override {text}"
        for length in range(len(path), 0, -1):
            if line := self._lines.get(path[:length]):
                return f"{self._file}:{line}"
        return self._file


def read_recipe_file(path: Path, *, overrides: Sequence[str]) -> tuple[dict[str, Any], Places]:
    """Read the mapping in a YAML file and apply overrides of the form `a.b=value` in order.

    Args:
        path: a YAML file whose root is a mapping.
        overrides: `dotted.key=value`, the value in YAML; `null` unsets a key.

    Returns:
        Plain data, not validated, and the place of every key.

    Raises:
        ShearingError: no such file, no YAML, a root that is no mapping, a key written twice, a malformed override, or
            one that names a part of a list.
    """
    places = Places(str(path))
    loader = _open(path)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            raise ShearingError(
                str(path),
                value="no mapping" if root is not None else "empty",
                allowed="a YAML mapping: `key: value` lines",
                mend="start from one of the files in recipes/",
            )
        for key_path, line in _walk(root, (), file=str(path)):
            places.set_line(key_path, line=line)
        data: dict[str, Any] = loader.construct_document(root)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ShearingError(
            str(path),
            value=error.problem or "malformed",
            allowed="valid YAML",
            mend="look at that line and the one above it: indentation, colons, quotes, brackets",
            where=f"{path}:{line}",
        ) from None
    finally:
        loader.dispose()
    apply_overrides(data, overrides, places=places)
    return data, places


def apply_overrides(data: dict[str, Any], overrides: Sequence[str], *, places: Places) -> None:
    """Set the keys that overrides of the form `a.b=value` name, in order, and remember their places.

    Raises:
        ShearingError: a malformed override, or one that names a part of a list.
    """
    for text in overrides:
        key_path, value = _parse_override(text)
        _assign(data, key_path, value, text=text)
        places.set_override(key_path, text=text)


def _open(path: Path) -> _Loader:
    text = _read_text(path)
    try:
        return _Loader(text)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ShearingError(
            str(path),
            value=f"the character {error.character:#04x}",
            allowed="text without control characters",
            mend="remove it from that line",
            where=f"{path}:{line}",
        ) from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise ShearingError(
            "RECIPE", value=str(path), allowed="a readable YAML file", mend=f"{reason}: check the path of the recipe"
        ) from None


def _walk(node: yaml.Node, path: KeyPath, *, file: str) -> Iterator[tuple[KeyPath, int]]:
    """Every key path below `node` with its line; keys written twice are an error, YAML itself keeps the last."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ShearingError(
                    ".".join(map(str, (*path, name))),
                    value="written twice",
                    allowed="each key once",
                    mend=f"remove one of lines {seen[name]} and {line}",
                    where=f"{file}:{line}",
                )
            seen[name] = line
            if _lacks_a_space(name, value):
                raise _no_space(".".join(map(str, path)) or file, name=name, where=f"{file}:{line}")
            yield (*path, name), line
            yield from _walk(value, (*path, name), file=file)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _walk(item, (*path, index), file=file)


def _parse_override(text: str) -> tuple[KeyPath, Any]:
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        raise ShearingError(
            "override", value=text, allowed="key=value with a dotted key, as prune.learning_rate=1e-4", mend="add the ="
        )
    try:
        _require_spaces(yaml.compose(value, Loader=yaml.SafeLoader), path=path, text=text)
        return path, yaml.load(value, Loader=_Loader)  # noqa: S506  a safe one
    except yaml.constructor.ConstructorError as error:
        raise ShearingError(
            key,
            value=value,
            allowed=f"a YAML value: {error.problem}",
            mend=f"write text in quotes that the shell leaves: {key}=\"'{value}'\"",
        ) from None
    except yaml.YAMLError:
        raise ShearingError(
            key, value=value, allowed="a YAML value", mend="quote the value: shells and YAML both read brackets"
        ) from None


def _require_spaces(node: yaml.Node | None, *, path: KeyPath, text: str) -> None:
    """Raises `ShearingError` if a mapping in an override has a key and its value written as one word."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if _lacks_a_space(str(key.value), value):
                raise _no_space(".".join(map(str, path)), name=str(key.value), where=f"override {text}")
            _require_spaces(value, path=(*path, str(key.value)), text=text)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _require_spaces(item, path=(*path, index), text=text)


def _lacks_a_space(name: str, value: yaml.Node) -> bool:
    """Whether what YAML reads as a key without a value is a key and its value: `{a:1}`."""
    return value.value == "" and value.tag.endswith(":null") and bool(_ONE_WORD.fullmatch(name))


def _no_space(field: str, *, name: str, where: str) -> ShearingError:
    key, _, value = name.partition(":")
    return ShearingError(
        field,
        value=name,
        allowed="keys with a space between the colon and the value: YAML takes this for one word, without a value",
        mend=f"write '{key}: {value}', in quotes on the command line",
        where=where,
    )


def _assign(data: dict[str, Any], path: KeyPath, value: Any, *, text: str) -> None:
    """Set a key; a word or number in the place of a section above it gives way, a list does not."""
    for depth, name in enumerate(path[:-1], start=1):
        below = data.get(str(name))
        if isinstance(below, list):
            field = ".".join(map(str, path[:depth]))
            items = ", ".join("{…}" if isinstance(item, dict) else "…" for item in below)
            raise ShearingError(
                field,
                value=below,
                allowed=f"an override of the whole list: {text} names a part of it",
                mend=f"write it as {field}='[{items or '…'}]'",
                where=f"override {text}",
            )
        if not isinstance(below, dict):
            below = data[str(name)] = {}
        data = below
    data[str(path[-1])] = value
