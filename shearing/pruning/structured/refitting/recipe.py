"""Recipe section `prune.block_refit`: local steps of each block, after the linear refit."""

from __future__ import annotations

from pydantic import Field

from shearing.settings.section import Positive, Section


class BlockRefitRecipe(Section):
    """Steps in which every block is trained alone, to put out what the source's does."""

    steps: int = Field(
        ge=0, description="Of each block, each on `micro_batch_size` sequences of the calibration text; 0: none."
    )
    learning_rate: Positive = Field(
        3e-4, description="Of Adam, for all weights of the block; it falls linearly to nothing."
    )
