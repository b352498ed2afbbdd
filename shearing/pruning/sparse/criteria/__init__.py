"""Criteria: how much each weight matters. One file each, one interface; `facts` lists them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.sparse.criteria.criterion import Criterion, criteria
    from shearing.pruning.sparse.criteria.facts import CRITERIA, CriterionFacts

__all__ = ["CRITERIA", "Criterion", "CriterionFacts", "criteria"]

__getattr__ = late(
    __name__,
    {"CRITERIA": "facts", "Criterion": "criterion", "CriterionFacts": "facts", "criteria": "criterion"},
)
