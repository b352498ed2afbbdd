"""Estimators: planted wrong starts are overturned with the recipe's defaults, and what the masks of a step are."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from shearing.models.shape import Shape
from shearing.pruning.structured.estimators.straight_through import centred_ranks
from shearing.pruning.structured.importance.chance import random_scores
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.pruning.structured.rounding import top_k
from tests.models.tiny import tiny_model

DEMO = {"duration": "24 steps", "warmup": "33%", "freeze": "80%", "final_learning_rate": 1.0}
LONG = {"duration": "200 steps"}
BASE = Shape.of(tiny_model().config)


def source_of(**sizes: int) -> Shape:
    return dataclasses.replace(BASE, **sizes)


def learner_of(source: Shape, target: Shape, *, scores=None, names=("layers",), seed=0, **keys) -> MaskLearner:
    section = PruneRecipe.model_validate({"batch_size": "1 sequences", **keys})
    chosen = MaskSettings.of(section, tokens_per_step=1, seed=seed)
    return MaskLearner(names, source=source, target=target, settings=chosen, scores=scores)


ROWS = {
    # Name of a granularity, sizes of source and target: rows of 3, 9, 30, 576 and 1,536 units.
    "3 KV groups": (
        "kv_groups",
        source_of(num_attention_heads=3, num_key_value_heads=3),
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        DEMO,
    ),
    "9 query heads": (
        "query_heads",
        source_of(num_attention_heads=9, num_key_value_heads=1),
        {"num_attention_heads": 6},
        DEMO,
    ),
    "30 layers": ("layers", source_of(num_hidden_layers=30), {"num_hidden_layers": 20}, DEMO),
    "576 dimensions": ("hidden", source_of(hidden_size=576), {"hidden_size": 480}, LONG),
    "1,536 units": ("intermediate", source_of(intermediate_size=1536), {"intermediate_size": 1024}, LONG),
}


def planted(name: str, *, noise: float, **changes) -> tuple[Tensor, Tensor, MaskLearner]:
    """Learns from a loss that is linear in the masks, from a start that has every row upside down.

    Args:
        name: of a row.
        noise: standard deviation of each gradient, in standard deviations of what it says.

    Returns:
        The share of the truly best units that the start keeps, the share that is learned, and the learner.
    """
    granularity, source, smaller, keys = ROWS[name]
    target = dataclasses.replace(source, **smaller)
    generator = torch.Generator().manual_seed(0)
    worth = random_scores(source, seed=7)[granularity]
    worth = centred_ranks(worth)
    scores = random_scores(source, seed=0) | {granularity: -worth}
    subject = learner_of(source, target, scores=scores, names=[granularity], **{**keys, **changes})
    truth = top_k(worth, keep=subject.granularities[0].target)

    def found() -> Tensor:
        return (subject.fix_final_masks() if subject.settings.freeze_step == step else subject.estimator.alive(step=0))[
            granularity
        ]

    step = 0
    before = (found() * truth).sum() / truth.sum()
    for step in range(subject.settings.freeze_step):
        subject.sample(step=step, draw=0)
        z = subject.estimator.masks(step=step, draw=0)[granularity]
        gradient = worth + noise * worth.std() * torch.randn(worth.shape, generator=generator)
        (subject.penalty(step=step) - (z * gradient).sum() / worth.shape[-1]).backward()
        subject.optimizer_step(step=step)
    return before, (subject.fix_final_masks()[granularity] * truth).sum() / truth.sum(), subject
