"""Recipe section `evaluation`: what is measured in the end."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shearing.settings.section import Section


class EvaluationRecipe(Section):
    """Held-out evaluation of every model of the run."""

    tokens_per_domain: int = Field(65_536, ge=2, description="Held-out tokens per domain.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward pass.")
    baselines: list[Literal["random", "magnitude", "importance"]] = Field(
        ["random", "magnitude", "importance"], description="Same shape, units chosen otherwise, scored after cutting."
    )
    speed: bool = Field(True, description="Measure tokens/s and latency of source and result.")
