"""What a search will take, from the recipe and the source's config alone: for `shear plan`."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from shearing.errors import named
from shearing.models.loading import load_config
from shearing.models.shape import Shape
from shearing.pruning.rotation.tied import config_as_cut
from shearing.runs.names import COMPONENT_NAMES, TEACHER_NAMES
from shearing.runs.planning.hardware import Hardware
from shearing.runs.planning.plan import planned_precision
from shearing.runs.recipe import Recipe
from shearing.runs.search.candidates import budget_of, candidates_at, named_candidates
from shearing.runs.search.plan import mistakes, plan_search
from shearing.runs.search.tables import plan_table


@named(COMPONENT_NAMES)
def price(recipe: Recipe, *, hardware: Hardware) -> RenderableType:
    """Candidates, rounds, FLOPs and time of a search, as tables for a terminal.

    Args:
        recipe: of the search.
        hardware: whose peak and MFU times are of.

    Raises:
        ShearingError: it cannot be searched, or no shape spends its budget.
    """
    if wrong := mistakes(recipe):
        raise wrong[0]
    config = config_as_cut(load_config(recipe.model.source, revision=recipe.model.revision), prune=recipe.prune)
    budget = budget_of(recipe, config=config)
    if budget is not None and budget.kind == "latency":
        return Text("search: a budget in ms needs times of layers, measured first by: shear search RECIPE --plan")
    if budget is None:
        candidates = named_candidates(recipe, config=config)
    else:
        candidates = candidates_at(recipe, budget, config=config, times=None)
    plan = plan_search(recipe, candidates, config=config, teacher=_teacher(recipe))
    precision = planned_precision(recipe, hardware=hardware)
    peak = None if hardware.gpu is None else hardware.gpu.peak.get(precision)
    rate = None if peak is None else peak * hardware.mfu * hardware.processes
    return plan_table(plan, recipe=recipe, flops_per_second=rate)


def _teacher(recipe: Recipe) -> Shape | None:
    teacher = recipe.teacher
    if teacher is None or not recipe.listens_online:
        return None
    with named(TEACHER_NAMES):
        return Shape.of(load_config(teacher.source, revision=teacher.revision))
