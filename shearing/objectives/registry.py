"""Every objective by name; importing this imports no torch, so that a recipe can take its values from here."""

from __future__ import annotations

OBJECTIVES: dict[str, str] = {
    "language_model": "shearing.objectives.language_model:LanguageModelLoss",
}
"""Name -> the class that is one, as `module:class`; see `objective.objective_of`."""
