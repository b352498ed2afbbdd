"""Recipe section `evaluation`: what the last stage measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from shearing.pruning.structured.importance.registry import METRICS, complete_metrics
from shearing.settings.section import Section, formerly

_REFIT = "+refit"
_ROOM = 0.6
"""Of a device's memory, for the weights of a model that is whole: activations and the cache of keys want some too."""
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


class GenerationRecipe(Section):
    """What source and models of the run write, and how near they are to the source; on test text."""

    prompts: int = Field(
        8, ge=0, description="Beginnings of documents that are continued, domains in turn; 0: leave all of this out."
    )
    prompt_tokens: int = Field(32, ge=1, description="Tokens of a prompt; shorter documents are no prompts.")
    tokens: int = Field(48, ge=1, description="Tokens that are written after each, at most.")
    text_tokens: int = Field(
        2048,
        ge=1,
        description="Tokens per domain on which next-token distributions are compared with the source's; a row at "
        "least.",
    )


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

    generation: GenerationRecipe = GenerationRecipe()
    tasks: list[str] = Field(
        [],
        description="Tasks of the lm-evaluation-harness (extra lm-eval) for the source and the run's models; paper11: "
        "the eleven of Sheared LLaMA, with its few-shot examples.",
    )
    fewshot: int | None = Field(
        None, ge=0, description="Examples before each question, for all tasks; null: as the preset or the task says."
    )
    task_limit: int | None = Field(None, ge=1, description="Questions of each task, the first ones; null: all.")
    task_folder: Path | None = Field(
        None, description="Folder of tasks (YAML, data beside it) that come before the harness's own of the same names."
    )
    task_batch_size: int = Field(8, ge=1, description="Requests of tasks in one forward pass.")
    task_baselines: bool = Field(False, description="Whether baselines are asked the tasks too.")
    placement: Literal["auto", "replicate", "shard"] = Field(
        "auto",
        description="Where a model is that answers tasks or writes, with several processes. replicate: whole on each; "
        f"shard: its layers shared out among them, each whole while it runs; auto: shared out where {_ROOM:.0%} of a "
        "device's memory cannot hold it.",
    )

    def shares_out(self, *, parameters: int, processes: int, copies: bool, memory: int | None) -> bool:
        """Whether the layers of a model that answers tasks or writes are shared out among processes.

        Args:
            parameters: of the model.
            processes: of the run.
            copies: whether autocast makes bf16 copies of weights.
            memory: bytes of a device; None: not known.
        """
        if processes == 1 or self.placement == "replicate":
            return False
        whole = parameters * (6 if copies else 4)
        return self.placement == "shard" or (memory is not None and whole > _ROOM * memory)

    def by_name(self) -> dict[str, Baseline]:
        """The baselines, by name and in order."""
        return {name: Baseline.of(name) for name in self.baselines}
