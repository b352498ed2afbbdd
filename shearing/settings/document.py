"""Recipes as documents: commented YAML of one recipe, a Markdown reference of every key."""

from __future__ import annotations

import json
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shearing.settings.quantities import ParameterCount

_BEGIN, _END = "<!-- keys: begin (make docs) -->", "<!-- keys: end -->"
_WIDTH = 110


def to_yaml(model: BaseModel) -> str:
    """A model as YAML that loads to an equal model, every key under a comment that says what it is."""
    return "\n".join(_yaml_lines(model, values=model.model_dump(mode="json"))) + "\n"


def keys(model: type[BaseModel], *, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a recipe that holds a value, dotted, with its field."""
    for name, field in model.model_fields.items():
        if section := section_of(field):
            yield from keys(section, prefix=f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a section of keys, or is one if it is there."""
    annotation = field.annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
        annotation = choices[0] if len(choices) == 1 else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def named_sections_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that maps names to sections of keys."""
    arguments = typing.get_args(field.annotation)
    if typing.get_origin(field.annotation) is not dict or not isinstance(arguments[1], type):
        return None
    return arguments[1] if issubclass(arguments[1], BaseModel) else None


def describe_type(annotation: Any) -> str:
    """What a key takes, in words."""
    if annotation is type(None):
        return "null"
    if annotation == ParameterCount:
        return "number of parameters"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return describe_type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return _either([describe_type(argument) for argument in arguments])
    if origin is Literal:
        return _either([f"`{argument}`" for argument in arguments])
    if origin is list:
        return f"list of {describe_type(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)} numbers"
    if origin is dict:
        if isinstance(arguments[1], type) and issubclass(arguments[1], BaseModel):
            return "mapping of names to sections"
        return "mapping" if Any in arguments else "mapping of names to numbers"
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false", "Path": "path"}
    names |= {"Duration": "duration", "BatchSize": "batch size"}
    return names[annotation.__name__]


def _either(choices: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(choices[:-1]), choices[-1]]))


def reference(model: type[BaseModel], *, heading: str = "##", prefix: str = "") -> str:
    """Markdown: one table per section of a recipe with every key, what it takes, its default and what it does."""
    parts = [_table(model)]
    for name, field in model.model_fields.items():
        if section := section_of(field):
            below = reference(section, heading=heading, prefix=f"{prefix}{name}.")
            optional = "" if field.is_required() or field.default is not None else " (may be absent)"
            parts.append(f"{heading} `{prefix}{name}`{optional}\n\n{_paragraph(section)}\n\n{below}")
        elif section := named_sections_of(field):
            below = reference(section, heading=heading, prefix=f"{prefix}{name}.NAME.")
            parts.append(f"{heading} `{prefix}{name}.NAME`\n\n{_paragraph(section)}\n\n{below}")
    return "\n\n".join(parts)


def embed_reference(document: str, *, model: type[BaseModel], heading: str = "##") -> str:
    """A document with the part between its two marks replaced by the reference.

    Raises:
        ValueError: the document lacks the marks.
    """
    before, _, rest = document.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not end:
        raise ValueError(f"no {_BEGIN} … {_END} in the document")
    return f"{before}{_BEGIN}\n\n{reference(model, heading=heading)}\n\n{_END}{after}"


def _yaml_lines(model: BaseModel, *, values: dict[str, Any], indent: str = "") -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        if section := section_of(field):
            yield ""
            yield from _comment(_paragraph(section), indent=indent)
            if (below := getattr(model, name)) is None:
                yield f"{indent}{name}: null"
                continue
            yield f"{indent}{name}:"
            yield from _yaml_lines(below, values=values[name], indent=indent + "  ")
        else:
            yield from _comment(described(field), indent=indent)
            yield f"{indent}{name}: {_flow(values[name])}"


def described(field: FieldInfo) -> str:
    """The description of a key, and the choices where it does not name them all."""
    description = field.description or ""
    choices = [argument for argument in typing.get_args(field.annotation) if isinstance(argument, str)]
    if all(choice in description for choice in choices):
        return description
    return f"{description} One of {', '.join(choices)}."


def _comment(text: str, *, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, width=_WIDTH - len(indent))]


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _table(model: type[BaseModel]) -> str:
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if section_of(field) is None:
            default = "required" if field.is_required() else f"`{_default_text(field)}`"
            rows.append(f"| `{name}` | {describe_type(field.annotation)} | {default} | {field.description} |")
    return "\n".join(rows)


def _default_text(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=False)
    if isinstance(default, float) and not default.is_integer():
        return f"{default:.4g}"
    return _flow(json.loads(json.dumps(list(default) if isinstance(default, tuple) else default, default=str)))


def _paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())
