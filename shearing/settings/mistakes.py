"""What is wrong with a recipe, in our words: each error of pydantic with its key, what that takes, and its place."""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from shearing.errors import CombinedShearingError, ShearingError
from shearing.settings.document import keys, named_sections_of, section_of
from shearing.settings.reading import KeyPath, Places


def located(
    error: ValidationError, *, model: type[BaseModel], data: dict[str, Any], places: Places
) -> list[ShearingError]:
    """Pydantic's errors as ours: one for each key, with the place where it was written.

    Args:
        model: what the data was validated against.
        data: plain data of the recipe.
        places: of its keys.
    """
    found: dict[str, ShearingError] = {}
    for entry in error.errors():
        original = entry.get("ctx", {}).get("error")
        if isinstance(original, CombinedShearingError):
            for each in original.errors:
                path: KeyPath = (*_path_in_data(entry["loc"], model=model, data=data), *each.field.split("."))
                name = ".".join(map(str, path))
                found[f"{name}: {each.allowed}"] = ShearingError(
                    name, value=each.value, allowed=each.allowed, mend=each.mend, where=places.of(path)
                )
            continue
        path = _path_in_data(entry["loc"], model=model, data=data)
        name = ".".join(map(str, path))
        if entry["type"] == "extra_forbidden":
            allowed, mend = _unknown_key(path, model=model)
        elif entry["type"] == "missing":
            what = "item" if isinstance(path[-1], int) else "key"
            allowed, mend = f"a value: the {what} is required", f"add it: {_description(path, model=model)}"
        else:
            allowed = entry["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            mend = _mend(entry, path=path, model=model)
        if name in found:
            # One key with several allowed types has one error for each of them.
            earlier = found[name]
            allowed = f"{earlier.allowed}; or {allowed}"
        value = "missing" if entry["type"] == "missing" else entry["input"]
        found[name] = ShearingError(name, value=value, allowed=allowed, mend=mend, where=places.of(path))
    return list(found.values())


def _mend(entry: ErrorDetails, *, path: KeyPath, model: type[BaseModel]) -> str:
    if entry["type"] == "renamed":
        return f"write {entry['ctx']['now']}"
    choices = re.findall(r"'([^']*)'", entry.get("ctx", {}).get("expected", ""))
    if near := difflib.get_close_matches(str(entry["input"]), choices, n=1):
        return f"did you mean {near[0]}?"
    return f"correct the value: {_description(path, model=model)}"


class _Position:
    """A place in a recipe's model, followed along the parts of a key path."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.section: type[BaseModel] | None = model
        self.field: FieldInfo | None = None
        self._named: type[BaseModel] | None = None

    def has(self, part: str | int) -> bool:
        return self.section is not None and part in self.section.model_fields

    def enter(self, part: str | int) -> None:
        if self._named is not None:  # `part` is a name that the user chose
            self.section, self.field, self._named = self._named, None, None
            return
        self.field = self.section.model_fields.get(str(part)) if self.section else None
        self.section = section_of(self.field) if self.field else None
        self._named = named_sections_of(self.field) if self.field else None


def _description(path: KeyPath, *, model: type[BaseModel]) -> str:
    """What the key at `path`, or the key or section around it, is."""
    position = _Position(model)
    section = model
    for part in path:
        position.enter(part)
        if position.section is not None:
            section = position.section
        elif position.field is not None and named_sections_of(position.field) is None:
            return position.field.description or ""
    if position.field is not None and position.section is None:
        return position.field.description or ""
    return " ".join((section.__doc__ or "").split())


def _path_in_data(location: KeyPath, *, model: type[BaseModel], data: Any) -> KeyPath:
    """The part of pydantic's location that exists in the file; the rest names alternatives of a type."""
    path: list[str | int] = []
    position = _Position(model)
    for part in location:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if not inside and not position.has(part):
            break
        path.append(part)
        too_short = isinstance(data, list) and isinstance(part, int) and part >= len(data)  # the item is missing
        data = data[part] if inside and not too_short else None
        position.enter(part)
    return tuple(path)


def _unknown_key(path: KeyPath, *, model: type[BaseModel]) -> tuple[str, str]:
    """What is allowed in place of an unknown key, and the nearest valid one."""
    position = _Position(model)
    for part in path[:-1]:
        position.enter(part)
    section = position.section or model
    wrong, full = str(path[-1]), ".".join(map(str, path))
    prefix = "".join(f"{part}." for part in path[:-1])
    everywhere = [name for name, _ in keys(model)]
    near = [f"{prefix}{name}" for name in difflib.get_close_matches(wrong, section.model_fields, n=1)]
    near += [name for name in everywhere if name.rpartition(".")[2] == wrong]
    near += difflib.get_close_matches(full, everywhere, n=1)
    allowed = f"a key of {prefix.rstrip('.') or 'the recipe'}: {', '.join(section.model_fields)}"
    return allowed, f"did you mean {near[0]}?" if near else "remove it"
