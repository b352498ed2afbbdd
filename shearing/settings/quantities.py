"""Quantities with their units in the type: durations, batch sizes, parameter counts.

Each parses what a recipe says ("0.4B tokens", "32 sequences", "1.3B") and prints as something that parses to itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from shearing.errors import ShearingError, key

_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d[\d_]*)"
"""Of a whole number, as a regular expression: underscores anywhere, commas between thousands."""
_NUMBER = rf"(?P<number>{DIGITS}(?:\.\d+)?(?:[eE]\+?\d+)?)\s*(?P<multiple>(?:[kKmMbBtT](?![a-zA-Z]))?)"
_COUNT = re.compile(_NUMBER)
_COUNT_OF = re.compile(_NUMBER + r"\s*(?P<unit>[a-z]+)")
_BYTES = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?:(?P<multiple>[kKmMgGtT])?[bB])?")
_PERCENT = re.compile(r"(?P<percent>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*%")

_Quantity = TypeVar("_Quantity")

DURATION_FORMS = "'640 steps', '0.4B tokens', '20%' of the stage, or a number of steps"
BATCH_SIZE_FORMS = "'32 sequences', '131072 tokens', or a number of sequences"
BYTES_FORMS = "'5 GB', '500 MB', or a number of bytes"
PARAMETER_COUNT_FORMS = "'64M', '1.3B', or a number of parameters"


@dataclass(frozen=True)
class Duration:
    """A length of training in exactly one unit: steps, tokens, or a fraction of the stage.

    Raises:
        ValueError: not exactly one unit, or out of range.
    """

    steps: int | None = None
    tokens: int | None = None
    fraction: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.steps, self.tokens, self.fraction) if value is not None]
        if len(given) != 1:
            raise ValueError("a duration has exactly one of steps, tokens and fraction")
        if given[0] < 0:
            raise ValueError("a duration is not negative")
        if self.fraction is not None and not self.fraction <= 1:
            raise ValueError("a fraction of the stage is at most 100%")

    @classmethod
    def parse(cls, value: object) -> Duration:
        """Read a duration as recipes write it.

        Args:
            value: "640 steps", "0.4B tokens", "20%", an int (steps) or a `Duration`.

        Raises:
            ValueError: anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(steps=value)
        if isinstance(value, str):
            text = value.strip()
            if percent := _PERCENT.fullmatch(text):
                return cls(fraction=float(Decimal(percent["percent"]) / 100))
            if count := _COUNT.fullmatch(text):
                return cls(steps=_whole(count))
            count = _COUNT_OF.fullmatch(text)
            if count and count["unit"] in ("step", "steps"):
                return cls(steps=_whole(count))
            if count and count["unit"] in ("token", "tokens"):
                return cls(tokens=_whole(count))
        raise ValueError(f"{value!r} is no duration; write {DURATION_FORMS}{of_commas(value)}")

    def in_steps(self, *, tokens_per_step: int, total_steps: int | None = None) -> int:
        """The duration in optimiser steps.

        Args:
            tokens_per_step: tokens of one global batch; tokens are rounded up to whole steps.
            total_steps: steps of the whole stage, which a fraction refers to; fractions are rounded to the nearest.

        Raises:
            ValueError: a fraction without `total_steps`.
        """
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return -(-self.tokens // tokens_per_step)
        assert self.fraction is not None
        if total_steps is None:
            raise ValueError(f"{self} is a share of a stage, and nothing says how long the stage is")
        return round(self.fraction * total_steps)

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps} steps"
        if self.tokens is not None:
            return f"{format_count(self.tokens)} tokens"
        # Through Decimal, because 100 * 0.07 is 7.000000000000001 in floating point.
        return f"{(Decimal(repr(self.fraction)) * 100).normalize():f}%"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _json_schema(DURATION_FORMS)


@dataclass(frozen=True)
class BatchSize:
    """The global batch of one optimiser step, in sequences or in tokens.

    Raises:
        ValueError: not exactly one unit, or not positive.
    """

    sequences: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.sequences, self.tokens) if value is not None]
        if len(given) != 1:
            raise ValueError("a batch size has exactly one of sequences and tokens")
        if given[0] < 1:
            raise ValueError("a batch size is at least 1")

    @classmethod
    def parse(cls, value: object) -> BatchSize:
        """Read a batch size as recipes write it.

        Args:
            value: "32 sequences", "131072 tokens", an int (sequences) or a `BatchSize`.

        Raises:
            ValueError: anything else.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(sequences=value)
        if isinstance(value, str):
            text = value.strip()
            if count := _COUNT.fullmatch(text):
                return cls(sequences=_whole(count))
            count = _COUNT_OF.fullmatch(text)
            if count and count["unit"] in ("sequence", "sequences"):
                return cls(sequences=_whole(count))
            if count and count["unit"] in ("token", "tokens"):
                return cls(tokens=_whole(count))
        raise ValueError(f"{value!r} is no batch size; write {BATCH_SIZE_FORMS}{of_commas(value)}")

    def in_sequences(self, *, sequence_length: int) -> int:
        """The batch in sequences.

        Args:
            sequence_length: tokens per sequence.

        Raises:
            ShearingError: a batch in tokens that is no whole number of sequences.
        """
        if self.sequences is not None:
            return self.sequences
        assert self.tokens is not None
        sequences, rest = divmod(self.tokens, sequence_length)
        if rest or not sequences:
            below, above = max(sequences, 1) * sequence_length, (sequences + 1) * sequence_length
            raise ShearingError(
                "batch_size",
                value=str(self),
                allowed=f"a multiple of {key('sequence_length')} = {sequence_length} tokens",
                mend=f"write '{below} tokens' or '{above} tokens'" if below != above else f"write '{above} tokens'",
            )
        return sequences

    def __str__(self) -> str:
        return f"{self.sequences} sequences" if self.sequences is not None else f"{self.tokens} tokens"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return _schema(cls.parse)

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return _json_schema(BATCH_SIZE_FORMS)


def parse_parameter_count(value: object) -> int:
    """Read a number of parameters: "64M", "1.3B", 64000000.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (count := _COUNT.fullmatch(value.strip())):
        return _whole(count)
    raise ValueError(f"{value!r} is no number of parameters; write {PARAMETER_COUNT_FORMS}{of_commas(value)}")


ParameterCount = Annotated[int, BeforeValidator(parse_parameter_count), Field(gt=0)]


def parse_bytes(value: str) -> int:
    """Read a size of a file: "5 GB", "500MB", "1000000"; K, M, G and T are powers of a thousand.

    Raises:
        ValueError: anything else.
    """
    found = _BYTES.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{value!r} is no size; write {BYTES_FORMS}")
    return int(Decimal(found["number"]) * 1000 ** " KMGT".index((found["multiple"] or " ").upper()))


def of_commas(value: object) -> str:
    """What to say besides of a quantity that cannot be read and has a comma; nothing of others."""
    there = isinstance(value, str) and "," in value
    return "; commas are between thousands, as 1,000, and decimals after a point, as 0.4B" if there else ""


def format_count(count: int) -> str:
    """The shortest text with a multiple (K, M, B, T) and at most two decimals that is exactly `count`."""
    for multiple, scale in reversed(_MULTIPLES.items()):
        if multiple and count >= scale and count * 100 % scale == 0:
            return f"{(Decimal(count) / scale).normalize():f}{multiple}"
    return str(count)


def format_parameters(count: float) -> str:
    """A parameter count in millions or billions: "64.2M", "1.30B"."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    if count >= 1e6:
        return f"{count / 1e6:.1f}M"
    return f"{count / 1e3:.1f}K" if count >= 1e3 else f"{count:.0f}"


def format_tokens(count: float) -> str:
    """A number of tokens: 0, 500, 20K, 1.5M, 0.4B."""
    for scale, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(count) >= scale:
            return f"{count / scale:.4g}{letter}"
    return f"{count:.4g}"


def _whole(match: re.Match[str]) -> int:
    number = Decimal(match["number"].replace("_", "").replace(",", "")) * _MULTIPLES[match["multiple"].upper()]
    if number != number.to_integral_value():
        raise ValueError(f"{match[0]!r} is no whole number")
    return int(number)


def _schema(parse: Callable[[object], _Quantity]) -> CoreSchema:
    return core_schema.no_info_plain_validator_function(
        parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
    )


def _json_schema(forms: str) -> JsonSchemaValue:
    return {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}], "description": forms}
