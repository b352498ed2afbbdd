"""A rotated model as a folder, written a tensor at a time: what is rotated need not be in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shearing.models.anatomy import anatomy_of
from shearing.models.families import Family
from shearing.models.loading import skeleton
from shearing.models.stored.paging.on_demand import weights_by_name
from shearing.models.stored.saving import write_model
from shearing.pruning.rotation.basis import Basis, rotated_in_turn, tied_gain

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@torch.no_grad()
def write_rotated(model: PreTrainedModel, basis: Basis, folder: Path, *, config: PretrainedConfig) -> float:
    """Write config and weights of a model in another basis.

    Args:
        model: of a family that `require_rotatable` takes; it stays as it is. Its weights may come on demand.
        basis: to rotate into.
        folder: made if it is not there.
        config: of what is written: the model's, or with a head of its own where the model's is the embedding.

    Returns:
        What a tied head loses, see `rotate`; 0 without one.

    Raises:
        OSError: see `write_model`.
    """
    family, weights, gain, lost = anatomy_of(model), weights_by_name(model), None, 0.0
    if config.tie_word_embeddings:
        gain, lost = tied_gain(family, weights, basis)
    write_model(
        skeleton(config), folder, weights=_all(family, weights, basis, layers=config.num_hidden_layers, gain=gain)
    )
    return lost


def _all(
    family: Family, weights: Mapping[str, Tensor], basis: Basis, *, layers: int, gain: Tensor | None
) -> Iterator[tuple[str, Tensor]]:
    """Rotated weights, and those that a rotation leaves as they are."""
    done = set()
    for name, weight in rotated_in_turn(family, weights, basis, layers=layers, last_gain=gain):
        done.add(name)
        yield name, weight
    for name in weights:
        if name not in done:
            yield name, weights[name]
