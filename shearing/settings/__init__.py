"""How keys are declared (`section`), read from YAML and the command line (`reading`), and explained (`document`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.settings.document import embed_reference, to_yaml
    from shearing.settings.mistakes import located
    from shearing.settings.neutral import Neutral, neutral_keys
    from shearing.settings.quantities import (
        BatchSize,
        Duration,
        ParameterCount,
        format_count,
        format_parameters,
        format_tokens,
    )
    from shearing.settings.reading import Places, apply_overrides, read_recipe_file
    from shearing.settings.section import BelowOne, Fraction, Positive, Section

__all__ = [
    "BatchSize",
    "BelowOne",
    "Duration",
    "Fraction",
    "Neutral",
    "ParameterCount",
    "Places",
    "Positive",
    "Section",
    "apply_overrides",
    "embed_reference",
    "format_count",
    "format_parameters",
    "format_tokens",
    "located",
    "neutral_keys",
    "read_recipe_file",
    "to_yaml",
]

__getattr__ = late(
    __name__,
    {
        "BatchSize": "quantities",
        "BelowOne": "section",
        "Duration": "quantities",
        "Fraction": "section",
        "Neutral": "neutral",
        "ParameterCount": "quantities",
        "Places": "reading",
        "Positive": "section",
        "Section": "section",
        "apply_overrides": "reading",
        "embed_reference": "document",
        "format_count": "quantities",
        "format_parameters": "quantities",
        "format_tokens": "quantities",
        "located": "mistakes",
        "neutral_keys": "neutral",
        "read_recipe_file": "reading",
        "to_yaml": "document",
    },
)
