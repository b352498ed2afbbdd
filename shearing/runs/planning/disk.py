"""What a run writes: checkpoints and models, in bytes, from settings and sizes alone; and what there is."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from shearing.errors import named
from shearing.models.families.axes import count
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.pruning.sparse.criteria.facts import CRITERIA
from shearing.pruning.sparse.job import Working, levels_of
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.pruning.sparse.search.database import database_bytes
from shearing.runs.continuation.cascade import cascade_of
from shearing.runs.continuation.moved import CASCADE
from shearing.runs.names import ONE_SHOT_NAMES
from shearing.runs.planning.memory import CHECKPOINT_BYTES_PER_PARAMETER
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.training.recipe import StageRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_BYTES_OF_WEIGHT = 4
_BYTES_OF_STORED_WEIGHT = 2
SEQLEN = 2048
"""Tokens of a sequence of one-shot calibration, where the recipe does not say; models that can read less read less."""


def checkpoint_bytes(settings: StageRecipe, *, sequence_length: int, parameters: int, moving: int = 0) -> int:
    """Of all checkpoints of a stage that can be there at the same time, with the one that is being written.

    Args:
        settings: of the stage.
        sequence_length: tokens of a sequence.
        parameters: of the model that is trained.
        moving: those of them whose masks move: what is dropped of them is set aside.
    """
    steps = settings.total_steps(sequence_length=sequence_length)
    forever = int(settings.schedule == "wsd")  # that before the decay
    if settings.keep_every is not None:
        forever += steps // max(1, settings.in_steps(settings.keep_every, sequence_length=sequence_length))
    of_one = CHECKPOINT_BYTES_PER_PARAMETER * parameters + _BYTES_OF_WEIGHT * moving
    # One more than is kept: it is whole beside the others before the oldest goes. A step has one; so have no steps.
    return of_one * min(settings.keep_last + 1 + forever, max(1, steps))


def moving_weights(recipe: Recipe, *, shape: Shape) -> int:
    """Weights whose masks move in the end, at most: some matrices may stay dense.

    Args:
        recipe: of the run.
        shape: of the model that is trained in the end.
    """
    if recipe.pretrain.ast is None:
        return 0
    matrices = [each for part in (shape.family.attention, shape.family.mlp) for each in part.linears]
    entries: int = count((each for each in matrices if len(each.axes) > 1), shape.units())
    return shape.num_hidden_layers * entries


def refitted_bytes(recipe: Recipe, *, source: Shape) -> int:
    """Bytes of the refitted layers, which are in the run's folder until training begins; at most.

    One process that holds all weights refits in memory.
    """
    if recipe.prune is None or not recipe.prune.refits(sequence_length=recipe.data.sequence_length):
        return 0
    return _BYTES_OF_WEIGHT * source.num_hidden_layers * sum(source.layer_parameters())


def rotated_bytes(recipe: Recipe, *, source: Shape) -> int:
    """Bytes of the source in another basis, which is in the run's folder until mask learning is complete."""
    if recipe.prune is None or recipe.prune.rotate == "none":
        return 0
    return _BYTES_OF_WEIGHT * source.num_parameters()


def run_bytes(
    recipe: Recipe,
    *,
    source: Shape,
    target: Shape | None,
    family: Iterable[Shape] = (),
    processes: int = 1,
    complete: Collection[Stage] = (),
) -> int:
    """Bytes that a run has at most at the same time, from now on.

    Args:
        recipe: of the run.
        source: shape of its source model.
        target: what that is cut to; None where a budget leaves it open, or no units are pruned.
        family: shapes of the smaller sizes that are cut out of the final model.
        processes: of the run; several cut each baseline into files.
        complete: stages that have been: what they had only while they were at work is not wanted again.
    """
    budget = None if recipe.target is None else recipe.target.parameters
    final = (source if target is None else target).num_parameters() if budget is None else budget
    # Before training there is nothing else; what goes after mask learning is there beside what that leaves.
    learns = "prune" not in complete
    rotated = rotated_bytes(recipe, source=source) if learns else 0
    total, on_the_way = 0, rotated + (refitted_bytes(recipe, source=source) if learns else 0)
    length = recipe.data.sequence_length
    if recipe.prune is not None:
        learned = source.num_parameters()
        total += checkpoint_bytes(recipe.prune, sequence_length=length, parameters=learned)
        total += learned * _BYTES_OF_WEIGHT  # prune/ ends in its weights
        on_the_way = max(on_the_way, rotated + total)
        total += final * _BYTES_OF_WEIGHT * (3 if recipe.pretrain.carries else 1)  # carried moments, and compact/
    if recipe.sparsify is not None:
        sparse = final * _sparse_weight_bytes(recipe)
        if "sparsify" not in complete:
            # The model, and its layers once more until it is whole; nothing of what trains it is there yet.
            working = working_of(recipe, shape=target or source)
            on_the_way = max(on_the_way, total + working.most(models=2 * sparse))
        total += sparse
    moving = moving_weights(recipe, shape=target or source)
    total += checkpoint_bytes(recipe.pretrain, sequence_length=length, parameters=final, moving=moving)
    total += final * _BYTES_OF_WEIGHT  # model/
    total += sum(shape.num_parameters() * _BYTES_OF_WEIGHT for shape in family)
    if recipe.target is not None and recipe.target.vocab_size is not None:
        total += final * _BYTES_OF_WEIGHT
    if processes > 1 and recipe.prune is not None and recipe.evaluation.baselines:
        total += final * _BYTES_OF_WEIGHT
    return max(total, on_the_way)


def cascade_bytes(recipe: Recipe, *, source: PretrainedConfig, processes: int = 1) -> int:
    """Bytes that the runs of a cascade have still to write, all of which stay; of a recipe without one, its own run.

    Args:
        recipe: of the cascade, whose targets shrink (`require_shrinking`).
        source: config of the first source, as masks and cutting see it.
        processes: see `run_bytes`.

    Raises:
        ShearingError: a target that its source cannot become.
    """
    total = 0
    for each in cascade_of(recipe):
        assert each.target is not None
        target = None
        if each.target.parameters is None:  # else its shape is learned: what follows is at most as large
            target = resolve_target(each.target, source=source)
        directory = RunDirectory(each.run_dir)
        if not directory.is_complete("pretrain"):
            complete = [stage for stage in each.stages if directory.is_complete(stage)]
            wanted = run_bytes(each, source=Shape.of(source), target=target, processes=processes, complete=complete)
            total += max(0, wanted - bytes_in(each.run_dir) + bytes_in(each.run_dir / CASCADE))
        if target is not None:
            source = config_for(source, shape=target, attention_layers=range(target.num_hidden_layers))
    return total


def working_of(recipe: Recipe, *, shape: Shape) -> Working:
    """What one-shot sparsity has on disk beside its models while it is at work, as `sparse.job.working` of the run.

    Args:
        recipe: of the run.
        shape: of the model that is made sparse; at most, where a budget leaves it open.

    Raises:
        ShearingError: see `levels_of`.
    """
    sparsify = recipe.sparsify
    if sparsify is None:
        return Working()
    stream = _BYTES_OF_WEIGHT * sparsify.samples * (sparsify.seqlen or SEQLEN) * shape.hidden_size
    weights = shape.num_hidden_layers * sum(shape.layer_parameters())
    by_gradients = "gradients" in CRITERIA[sparsify.criterion].needs
    num_levels, levels = 0, 0
    if sparsify.allocation == "msp":
        with named(ONE_SHOT_NAMES):
            num_levels = len(levels_of(sparsify))
        levels = database_bytes(
            levels=num_levels,
            weights=weights,
            stored_bytes=_sparse_weight_bytes(recipe) * weights,
            changes=bool(RECONSTRUCTIONS[sparsify.resolved_reconstruction].needs),
        )
    return Working(
        gradients=_BYTES_OF_WEIGHT * weights if by_gradients else 0,
        streams=stream * (shape.num_hidden_layers + 2) if by_gradients else 0,
        activations=stream if sparsify.needs_text and sparsify.offload == "disk" else 0,
        levels=levels,
        num_levels=num_levels,
    )


def _sparse_weight_bytes(recipe: Recipe) -> int:
    """Of a weight of what is made sparse, which keeps its dtype: fp32 of what was cut, else the source's.

    A source in fp32 needs more. It is refused by one-shot sparsity itself, which comes first where nothing is cut.
    """
    return _BYTES_OF_WEIGHT if "compact" in recipe.stages else _BYTES_OF_STORED_WEIGHT


def bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is none."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            # Another process may be at work there; the lock that keeps it apart is taken after all checks.
            with contextlib.suppress(FileNotFoundError):
                total += (Path(root) / name).stat().st_size
    return total


def bytes_free(path: Path) -> int:
    """Bytes free on the disk that holds a path, or will."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free
