"""A head that is the embedding cannot take the last norm's gain: what can be done about it before a rotation."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from shearing.errors import ShearingError, key
from shearing.models.anatomy import anatomy_of
from shearing.models.shape import Shape
from shearing.pruning.rotation.basis import weight_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from shearing.pruning.structured.recipe import PruneRecipe


@torch.no_grad()
def untie(model: PreTrainedModel) -> None:
    """Give a model's head weights of its own, in place: the same function, with V d parameters more if it was tied.

    Its config says so too.
    """
    family = anatomy_of(model)
    head, embedding = (model.get_submodule(name) for name in (family.head, family.embedding))
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(weight_of(embedding).clone())
    model.config.tie_word_embeddings = False


def config_as_cut(config: PretrainedConfig, *, prune: PruneRecipe | None) -> PretrainedConfig:
    """The config of the model whose units go: the source's, but for a head of its own if the rotation unties it."""
    if prune is None or not prune.unties or not config.tie_word_embeddings:
        return config
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    return untied


def require_place_for_gain(source: Shape, *, prune: PruneRecipe, target: Shape | None) -> None:
    """Check that a rotation of a tied source is asked for with its price.

    Args:
        source: shape of the source as it is.
        prune: says whether it is rotated, and what a tied head becomes.
        target: shape of the result as it is written; None: not known yet.

    Raises:
        ShearingError: nothing is said of a tied head; or with a head of its own the result is no smaller than the
            source.
    """
    if prune.rotate == "none" or not source.tied:
        return
    head = source.vocab_size * (source if target is None else target).hidden_size
    if prune.rotate_tied == "refuse":
        raise ShearingError(
            "rotate",
            value=f"{prune.rotate}, of a head that is the embedding",
            allowed=f"{key('rotate_tied')} other than refuse there: the head, which is the embedding too, cannot take "
            "the last norm's gain",
            mend=f"set {key('rotate_tied')}=untie ({head:,} parameters more) or diagonal (another function), or "
            f"{key('rotate')}=none",
        )
    if prune.unties and target is not None and target.num_parameters() >= source.num_parameters():
        raise ShearingError(
            "rotate_tied",
            value=f"untie: {target.num_parameters():,} parameters, of which {head:,} are the head's",
            allowed=f"with a head of its own, a target of fewer than the source's {source.num_parameters():,}",
            mend=f"lower the target's sizes, or set {key('rotate')}=none",
        )
