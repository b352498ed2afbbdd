"""Recipe section `prune.block_refit`: local steps of each block, after the linear refit."""

from __future__ import annotations

from pydantic import Field

from shearing.settings.section import Positive, Section


class BlockRefitRecipe(Section):
    """Steps in which every block is trained alone, to put out what the source's does."""

    steps: int = Field(ge=0, description="Of each block; 0: none.")
    sequences: int = Field(4, ge=1, description="Of a step, of the calibration text; one passes at a time.")
    learning_rate: Positive = Field(
        1e-4, description="Of Adam, for all weights of the block; it falls linearly to nothing."
    )
