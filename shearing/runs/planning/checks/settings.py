"""How a run computes and judges: engine, compiled layers, tasks, what is exported."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from shearing.errors import ShearingError, named
from shearing.evaluation.tasks.chosen import chosen_tasks
from shearing.evaluation.tasks.opening import open_harness
from shearing.models.shape import Shape
from shearing.runs.names import EVALUATION_NAMES
from shearing.runs.planning.summary import NOT_EXPORTABLE
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import Stage
from shearing.training.engines.deepspeed_config import user_config
from shearing.training.engines.facts import ENGINES
from shearing.training.engines.fsdp2_engine import require_fsdp2
from shearing.training.recipe import DeepSpeedRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_exportable(recipe: Recipe, *, stages: Sequence[Stage]) -> None:
    """What comes of a budget can be written as an ordinary model, where that is wanted."""
    target = recipe.target
    if target is not None and target.parameters is not None and not target.uniform and set(stages) - {"prune"}:
        raise ShearingError(
            "target.uniform",
            value=False,
            allowed=f"true: {NOT_EXPORTABLE}",
            mend="set target.uniform=true, give sizes by name, or learn masks only with `shear prune`",
        )


def require_engine(recipe: Recipe) -> None:
    """The engine is installed, and its settings go together."""
    engine, settings = recipe.training.engine, recipe.training.deepspeed
    package = ENGINES[engine].package
    if engine == "deepspeed":
        user_config(settings)
    if package is not None and find_spec(package) is None:
        raise ShearingError(
            "training.engine",
            value=engine,
            allowed=f"torch: the package {package} is not installed",
            mend=f"pip install 'shearing[{package}]', or set training.engine=torch",
        )
    if engine == "deepspeed":
        _require_offloading(settings)
    if engine == "fsdp2":
        require_fsdp2()


def _require_offloading(settings: DeepSpeedRecipe) -> None:
    if settings.offload_parameters != "none" and settings.zero_stage != 3:
        raise ShearingError(
            "training.deepspeed.offload_parameters",
            value=settings.offload_parameters,
            allowed=f"none with zero_stage {settings.zero_stage}: only ZeRO-3 cuts up weights",
            mend="set training.deepspeed.zero_stage=3, or training.deepspeed.offload_parameters=none",
        )
    if settings.offload_optimizer != "none" and settings.zero_stage == 0:
        raise ShearingError(
            "training.deepspeed.offload_optimizer",
            value=settings.offload_optimizer,
            allowed="none with zero_stage 0",
            mend="set training.deepspeed.zero_stage=1 or higher",
        )


def require_context(recipe: Recipe, *, config: PretrainedConfig) -> None:
    """The source model reads sequences as long as the recipe's."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise ShearingError(
            "data.sequence_length",
            value=recipe.data.sequence_length,
            allowed=f"at most {limit}, the positions of the source model",
            mend=f"set data.sequence_length={limit} or less",
        )


def require_uncompiled(recipe: Recipe, *, source: Shape) -> None:
    """Layers of experts are not compiled: which tokens an expert has is not known before the router has run."""
    if recipe.training.compile and source.num_experts:
        raise ShearingError(
            "training.compile",
            value=True,
            allowed=f"false with the experts of a {source.family.model_type}",
            mend="set training.compile=false",
        )


@named(EVALUATION_NAMES)
def require_tasks(recipe: Recipe, *, last: bool) -> None:
    """The tasks are there; with their text, where other stages come first, so that a run does not end in an error."""
    evaluation = recipe.evaluation
    if evaluation.tasks:
        tasks = chosen_tasks(evaluation.tasks)
        harness = open_harness(tasks, folder=evaluation.task_folder)
        for task in tasks if last else ():
            harness.load(task.name)
