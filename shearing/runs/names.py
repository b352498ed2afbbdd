"""What components call the settings they are given, by the keys of a run: one table for all of them.

A component says what is wrong in its own words: a key of its section without the section, an argument. Where a run
hands its sections to components, errors are renamed with these tables (`errors.named`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import BaseModel

from shearing.data.recipe import DataRecipe, MixtureRecipe
from shearing.models.recipe import ModelRecipe, TargetRecipe
from shearing.objectives.recipe import DistillRecipe, HiddenRecipe
from shearing.pruning.sparse.recipe import OneShotRecipe
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.runs.stages.evaluation.recipe import EvaluationRecipe
from shearing.training.adapters.recipe import ADAPTERS
from shearing.training.recipe import (
    DeepSpeedRecipe,
    Fsdp2Recipe,
    PretrainRecipe,
    StageRecipe,
    TrainingRecipe,
)

SECTIONS: Mapping[str, type[BaseModel]] = {
    "model": ModelRecipe,
    "data": DataRecipe,
    "target": TargetRecipe,
    "mixture": MixtureRecipe,
    "prune": PruneRecipe,
    "pretrain": PretrainRecipe,
    "training": TrainingRecipe,
    "training.deepspeed": DeepSpeedRecipe,
    "training.fsdp2": Fsdp2Recipe,
}
"""Those of a run whose keys components know. Two have tables of their own: `sparsify`, with the keys of a command too,
and `distill`, whose keys are called as those of other sections are."""


def own_keys(section: type[BaseModel]) -> list[str]:
    """Keys of a section, without those that both training stages have."""
    return [name for name in section.model_fields if name not in StageRecipe.model_fields]


def _in(section: str, names: Iterable[str]) -> dict[str, str]:
    return {name: f"{section}.{name}" for name in names}


ADAPTER_NAMES: Mapping[str, Mapping[str, str]] = {
    name: _in(f"pretrain.{name}", section.model_fields) for name, section in ADAPTERS.items()
}
"""Keys of each kind of adapters by the keys of a run; other kinds have keys of the same names."""

COMPONENT_NAMES: Mapping[str, str] = {
    **{name: key for section, keys in SECTIONS.items() for name, key in _in(section, own_keys(keys)).items()},
    **{name: f"prune.{name} and pretrain.{name}" for name in StageRecipe.model_fields},
    "folder": "run_dir",
}
"""What components call, by the keys of a run."""

DISTILL_NAMES: Mapping[str, str] = {
    **_in("distill.hidden", HiddenRecipe.model_fields),
    **_in("distill", DistillRecipe.model_fields),
}
"""Keys of distillation by the keys of a run; other sections have keys of the same names."""

TEACHER_NAMES: Mapping[str, str] = {
    "source": "distill.teacher",
    "model": "distill.teacher",
    "revision": "distill.revision",
}
"""What models are called where the teacher is meant."""

EVALUATION_NAMES: Mapping[str, str] = _in("evaluation", EvaluationRecipe.model_fields)
"""Keys of evaluation by the keys of a run; other sections have some of the same names."""

ONE_SHOT_NAMES: Mapping[str, str] = {
    **_in("sparsify", OneShotRecipe.model_fields),
    "model": "model.source",
    "domains": "data.domains",
    "output": "run_dir",
    "device": "training.device",
}
"""Keys of one-shot sparsity, and what else it says, by the keys of a run."""
