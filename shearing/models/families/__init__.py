"""The supported model families, one file each. A new one is one declaration: see `family.Family`."""

from __future__ import annotations

from shearing.models.families.family import Family
from shearing.models.families.llama import LLAMA
from shearing.models.families.mistral import MISTRAL
from shearing.models.families.qwen2 import QWEN2
from shearing.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
"""`config.model_type` -> family; one that a project declares for itself is added here too."""
