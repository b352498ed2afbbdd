"""Options that are keys of a recipe: named, typed and explained as the recipe declares them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import typer
from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from shearing.settings.document import described

Command = TypeVar("Command", bound=Callable[..., None])
_NUMBERS = (bool, int, float)


def with_keys(
    recipe: type[BaseModel],
    panels: Mapping[str | None, Iterable[str]],
    *,
    without: Iterable[str] = (),
    short: Mapping[str, str] | None = None,
    alone: bool = False,
) -> Callable[[Command], Command]:
    """Gives a command an option for each of these keys, before the keyword-only parameters that it declares itself.

    The command takes them as `**options`: key -> value, None where an option was not given.

    Args:
        recipe: declares the keys.
        panels: heading in the help -> names of keys; None: where the command's own options are.
        without: names in `panels` that this command does not have.
        short: name of a key -> an option of one letter, as `-o`.
        alone: no file says keys too, so those that have no default are said to be required.
    """
    left_out, letters = set(without), short or {}
    generated = [
        _parameter(name, recipe.model_fields[name], panel=panel, letter=letters.get(name), alone=alone)
        for panel, names in panels.items()
        for name in names
        if name not in left_out
    ]

    def give(command: Command) -> Command:
        declared = inspect.signature(command, eval_str=True)
        own = [parameter for parameter in declared.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        first = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
        last = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
        # What typer makes its options of.
        command.__signature__ = declared.replace(parameters=[*first, *generated, *last])  # type: ignore[attr-defined]
        return command

    return give


def _parameter(name: str, field: FieldInfo, *, panel: str | None, letter: str | None, alone: bool) -> inspect.Parameter:
    aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else [name]
    options = [f"--{str(alias).replace('_', '-')}" for alias in aliases]
    taken = _taken(field.annotation)
    text = described(field)
    if not field.is_required() and isinstance(field.default, (str, float, int)) and field.default is not False:
        text += f" Unset: {field.default}."
    if alone and field.is_required():
        text += " Required."
    if typing.get_origin(taken) is list:
        text += " May be repeated."
    option = typer.Option(*filter(None, [letter]), *options, help=text, rich_help_panel=panel)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[taken | None, option]
    )


def _taken(annotation: Any) -> Any:
    """What an option takes: numbers, flags and lists of text as such; all else as text that the recipe reads itself."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        choices = [choice for choice in typing.get_args(annotation) if choice is not type(None)]
        annotation = choices[0] if len(choices) == 1 else None
    if annotation in _NUMBERS:
        return annotation
    return list[str] if typing.get_origin(annotation) is list else str
