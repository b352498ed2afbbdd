"""A distillation of a tiny model by another one, as tests need it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from shearing.models.correspondence import Correspondence
from shearing.objectives.distillation import Distillation
from shearing.objectives.objective import Parts
from shearing.objectives.recipe import DistillRecipe
from tests.models.tiny import tiny_model

DOMAINS = ("first", "second")


def parts_of(
    *,
    model: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    height: float = 1.0,
    correspondence: Correspondence | None = None,
    hidden_steps: int = 0,
    **distill: Any,
) -> Parts:
    """What a stage would have, with a teacher of other weights."""
    return Parts(
        model=tiny_model() if model is None else model,
        chunk_tokens=8,
        domains=DOMAINS,
        distill=DistillRecipe.model_validate({"domains": "all", **distill}),
        teacher=lambda: tiny_model(seed=1) if teacher is None else teacher,
        height=lambda _: height,
        correspondence=correspondence,
        hidden_steps=hidden_steps,
    )


def tiny_distillation(**settings: Any) -> Distillation:
    """The objective; arguments as of `parts_of`."""
    return Distillation.of(parts_of(**settings))
