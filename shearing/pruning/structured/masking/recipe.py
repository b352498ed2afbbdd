"""Recipe section `family`: several sizes out of one training."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shearing.errors import ShearingError
from shearing.models.recipe import Sizes
from shearing.pruning.structured.importance.registry import complete_metrics
from shearing.settings.section import Positive, Section

WHOLE = "whole"
"""What the largest size of a family is called: the model that is trained, all of it."""

METRIC_NAMES = tuple(complete_metrics())

if TYPE_CHECKING:
    MetricName = str
else:
    MetricName = Literal[METRIC_NAMES]


class FamilySize(Sizes):
    """A smaller model inside the one that is trained: sizes by name (unset: as in the size before it)."""

    weight: Positive = Field(1.0, description="How often this size is trained, next to the other weights.")


class FamilyRecipe(Section):
    """Several sizes out of one training: continued pretraining trains parts of its model in turns, and cuts them out.

    Units are sorted by importance once, before the first step; every size keeps the first of each kind, so each is
    inside those before it. The largest is the model that is trained: what `target` leaves, or the source.
    """

    sizes: dict[str, FamilySize] = Field(
        min_length=1,
        description="By the names of their folders in run_dir/family, from large to small; all smaller than the whole.",
    )
    weight: Positive = Field(1.0, description="How often the whole model is trained, next to the weights of `sizes`.")
    draws: int = Field(
        1,
        ge=1,
        description="Equal shares of a step's batch, each of which trains a size of its own draw. The same sizes "
        "whatever the number of processes and micro-batches.",
    )
    importance: MetricName | None = Field(
        None,
        description="What sorts units, measured on the model that is trained, in view of the smallest size. null: "
        "prune.initial_masks, or reconstruction where that says nothing.",
    )
    calibration_tokens: int = Field(65_536, ge=2, description="Tokens read for it: the first ones of training.")


def family_contradictions(family: FamilyRecipe) -> Iterator[ShearingError]:
    """Names that are no folders', and sizes that say nothing.

    Args:
        family: the section.
    """
    for name, size in family.sizes.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == WHOLE:
            yield ShearingError(
                f"sizes.{name}",
                value=name,
                allowed=f"the name of a folder: letters, digits, '.', '_' and '-'; not {WHOLE}, which is the model "
                "that the others are parts of",
                mend="choose another name, as small",
            )
        if not any(getattr(size, each) is not None for each in Sizes.model_fields):
            yield ShearingError(
                f"sizes.{name}",
                value="empty",
                allowed=f"at least one of {', '.join(sorted(Sizes.model_fields))}",
                mend="say what is smaller than in the size before, as hidden_size: 480",
            )
