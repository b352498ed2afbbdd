"""Recipe section `evaluation`: what the last stage measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shearing.pruning.structured.importance.registry import METRICS, complete_metrics
from shearing.settings.section import Section, formerly

_REFIT = "+refit"
BASELINES = (*complete_metrics(), *(name + _REFIT for name in complete_metrics()))

if TYPE_CHECKING:
    BaselineName = str
else:
    BaselineName = Annotated[Literal[BASELINES], formerly(importance="activations")]


@dataclass(frozen=True)
class Baseline:
    """One way to cut the source without training: what chooses the units, and whether those that stay are refitted."""

    metric: str
    refitted: bool

    @classmethod
    def of(cls, name: str) -> Baseline:
        """The baseline of a name in `BASELINES`."""
        return cls(name.removesuffix(_REFIT), name.endswith(_REFIT))

    @property
    def title(self) -> str:
        """What tables call it."""
        return METRICS[self.metric].title + ", refitted" * self.refitted


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
        ["random", "magnitude", "activations", "reconstruction", "reconstruction+refit"],
        description="Same shape, units chosen by what the name says, cut and not trained; +refit: the weights that "
        "stay are refitted, as prune.compensate does. The start of the run's own masks with its refit is the fair one.",
    )
    speed: bool = Field(True, description="Measure tokens/s and latency of source and result.")

    def by_name(self) -> dict[str, Baseline]:
        """The baselines, by name and in order."""
        return {name: Baseline.of(name) for name in self.baselines}
