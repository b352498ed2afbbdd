"""Every objective by name; importing this imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shearing.objectives.objective import Objective, Parts

OBJECTIVES: Mapping[str, str] = {
    "language_model": "shearing.objectives.language_model.LanguageModelLoss",
}
"""Name, as recipes say it -> the class that is one."""


def objective_of(name: str, *, parts: Parts) -> Objective:
    """The objective of a name.

    Args:
        name: one of `OBJECTIVES`.
        parts: what the stage has.
    """
    module, _, of_class = OBJECTIVES[name].rpartition(".")
    objective: Objective = getattr(importlib.import_module(module), of_class).of(parts)
    return objective
