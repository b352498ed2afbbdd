"""Recipe section `evaluation`: what the last stage measures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from shearing.pruning.structured.importance.registry import complete_metrics
from shearing.settings.section import Section

if TYPE_CHECKING:
    BaselineName = str
else:
    BaselineName = Literal[complete_metrics()]


class EvaluationRecipe(Section):
    """Held-out evaluation of every model of the run."""

    outside: Path | None = Field(
        None,
        description="Corpus of text that the run never trains on, of other kinds than its domains, by the same "
        "tokenizer: the test split of each of its domains is measured too, with a mean of its own.",
    )
    tokens_per_domain: int = Field(65_536, ge=2, description="Tokens per domain, of its test split.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward pass.")
    baselines: list[BaselineName] = Field(
        ["random", "magnitude", "activations"], description="Same shape, units chosen otherwise, scored after cutting."
    )
    speed: bool = Field(True, description="Measure tokens/s and latency of source and result.")
