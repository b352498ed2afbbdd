"""Masks while they are learned."""

from __future__ import annotations

from dataclasses import dataclass

from shearing.models.masked import MaskedModel
from shearing.pruning.structured.learner import MaskLearner


@dataclass(frozen=True, kw_only=True)
class Masking:
    """The masks of mask learning: where they act and what learns them."""

    model: MaskedModel
    learner: MaskLearner
