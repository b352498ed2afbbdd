"""MosaicML's Composer: mask learning as an algorithm, domain weights as a callback, a model and its batches.

Needs the extra `composer`, whose torch is older than ours: in an environment of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.integrations.composer.algorithm import LearnMasks
    from shearing.integrations.composer.batches import MixtureBatches
    from shearing.integrations.composer.domain_weights import DynamicBatchLoading
    from shearing.integrations.composer.model import ObjectiveModel

__all__ = ["DynamicBatchLoading", "LearnMasks", "MixtureBatches", "ObjectiveModel"]

__getattr__ = late(
    __name__,
    {
        "DynamicBatchLoading": "domain_weights",
        "LearnMasks": "algorithm",
        "MixtureBatches": "batches",
        "ObjectiveModel": "model",
    },
)
