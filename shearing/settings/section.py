"""What every section of every recipe is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


def formerly(**names: str) -> BeforeValidator:
    """Refuses values by names that they had once, each with the name that it has now."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in names:
            raise PydanticCustomError(
                "renamed", "'{now}': it was called '{once}'", {"now": names[value], "once": value}
            )
        return value

    return BeforeValidator(check)


class Section(BaseModel):
    """A named group of keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # Pydantic takes true for 1, and YAML takes `yes` and `on` for true.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("no true or false")
        return value
