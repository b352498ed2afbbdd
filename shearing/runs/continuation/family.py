"""The sizes of a family: each is smaller than the one before it and inside it, by one order of the units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shearing.data.corpus.corpus import whole_rows
from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import SIZE_NAMES, Shape, config_for, resolve_target
from shearing.pruning.structured.importance.metric import Cost, Evidence
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.masking.recipe import FamilyRecipe
from shearing.runs.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def importance_of(recipe: Recipe, *, family: FamilyRecipe) -> str:
    """The name of the metric that sorts the units of a family."""
    return family.importance or (recipe.prune and recipe.prune.graded_by) or "reconstruction"


def sorting_cost(recipe: Recipe, *, family: FamilyRecipe, shape: Shape, smallest: Shape) -> Cost:
    """What the metric that sorts the units of a family has to compute.

    Args:
        recipe: of the run.
        family: its sizes.
        shape: of the model that they are parts of.
        smallest: of the sizes.
    """
    name, length = importance_of(recipe, family=family), recipe.data.sequence_length
    rows = whole_rows(family.calibration_tokens, sequence_length=length)
    text = (Inputs(torch.empty(rows, length, dtype=torch.int64, device="meta"), None),)
    evidence = Evidence(text=text if METRICS[name].reads_text else (), target=smallest, seed=recipe.seed)
    return metric_of(name).cost(shape, evidence=evidence)


def family_shapes(recipe: Recipe, *, source: PretrainedConfig) -> dict[str, Shape]:
    """Shapes of the sizes by their names, from large to small, without the model that they are parts of.

    Args:
        recipe: of the run; empty where it has no family.
        source: config of the source model.

    Raises:
        ShearingError: a size is larger than the one before in something, equal to it, or no shape of this model.
    """
    if recipe.family is None:
        return {}
    config = source
    if recipe.target is not None:
        shape = resolve_target(recipe.target, source=config)
        config = config_for(config, shape=shape, attention_layers=range(shape.num_hidden_layers))
    before, shapes = "the model that is trained", dict[str, Shape]()
    for name, size in recipe.family.sizes.items():
        have = Shape.of(config)
        try:
            shape = resolve_target(size, source=config)
        except ShearingError as error:
            raise ShearingError(
                f"family.sizes.{name} ({error.field})",
                value=error.value,
                allowed=f"{error.allowed}; its source is {before}: {_in_words(have)}",
                mend=error.mend,
            ) from None
        if shape == have:
            raise ShearingError(
                f"family.sizes.{name}",
                value=_in_words(shape),
                allowed=f"something smaller than in {before}: {_in_words(have)}",
                mend="order sizes from large to small, and say what gets smaller",
            )
        shapes[name] = shape
        config = config_for(config, shape=shape, attention_layers=range(shape.num_hidden_layers))
        before = name
    return shapes


def _in_words(shape: Shape) -> str:
    return ", ".join(f"{name} {getattr(shape, name)}" for name in SIZE_NAMES)
