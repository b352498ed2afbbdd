"""Criteria: how much each weight matters. One file each, one interface."""

from __future__ import annotations

from collections.abc import Mapping

from shearing.pruning.sparse.criteria.criterion import Criterion
from shearing.pruning.sparse.criteria.magnitude import Magnitude
from shearing.pruning.sparse.criteria.sparsegpt import SparseGPT
from shearing.pruning.sparse.criteria.wanda import Wanda

__all__ = ["Criterion", "criteria"]


def criteria() -> Mapping[str, Criterion]:
    """Every criterion by name."""
    return {criterion.name: criterion for criterion in (Magnitude(), Wanda(), SparseGPT())}
