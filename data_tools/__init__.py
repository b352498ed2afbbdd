"""From raw text to tokenised domains, and what stands in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from data_tools.adoption.adoption import adopt
    from data_tools.inspection.inspection import inspect
    from data_tools.inspection.verification import verify
    from data_tools.preparation.prepare import prepare
    from data_tools.preparation.recipe import PreparationRecipe, load_preparation

__all__ = ["PreparationRecipe", "adopt", "inspect", "load_preparation", "prepare", "verify"]

__getattr__ = late(
    __name__,
    {
        "PreparationRecipe": "preparation.recipe",
        "adopt": "adoption.adoption",
        "inspect": "inspection.inspection",
        "load_preparation": "preparation.recipe",
        "prepare": "preparation.prepare",
        "verify": "inspection.verification",
    },
)
