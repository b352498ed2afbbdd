"""Keys that change how something is made, kept or watched, never what it is beyond rounding.

They are marked where they are declared, so that whoever adds a key decides it there:

    keep_last: Neutral[int] = Field(2, ge=1, description="Checkpoints kept, newest first.")

What is interrupted may be continued with other values of these keys; any other key has to be what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, TypeVar

from pydantic import BaseModel

from shearing.settings.document import section_of


class _Mark:
    """In the metadata of a field; says nothing of what the field takes."""


_Taken = TypeVar("_Taken")
Neutral = Annotated[_Taken, _Mark()]
"""What a neutral key takes; of a section, that all its keys are neutral."""


def neutral_keys(model: type[BaseModel]) -> frozenset[str]:
    """The keys and sections of a recipe that are marked, dotted; below a marked section everything is neutral."""
    return frozenset(_marked(model, prefix=""))


def is_neutral(key: str, *, among: frozenset[str]) -> bool:
    """Whether a dotted key is one of those, or below one."""
    return any(key == name or key.startswith(f"{name}.") for name in among)


def _marked(model: type[BaseModel], *, prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if any(isinstance(each, _Mark) for each in field.metadata):
            yield f"{prefix}{name}"
        elif section := section_of(field):
            yield from _marked(section, prefix=f"{prefix}{name}.")
