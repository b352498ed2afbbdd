"""One-shot sparsity inside a run: of the source, or of what was cut from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, skeleton
from shearing.recipe import Recipe
from shearing.run_directory import RunDirectory
from shearing.sparsity.output import read_manifest
from shearing.sparsity.patterns import KeptOf
from shearing.sparsity.recipe import OneShotRecipe, SparsifyRecipe
from shearing.sparsity.sparsify import sparsify as make_sparse

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def sparsify(recipe: Recipe, *, console: Console | None = None) -> dict[str, Any]:
    """Write run_dir/sparsify/model: the sparse model, its masks and its manifest.

    Continues behind the last layer that was finished.

    Args:
        recipe: a recipe with the section `sparsify`, whose stage `compact`, if it has one, is complete.
        console: where progress goes; stdout if None.

    Returns:
        The content of sparsify/complete.json: the manifest's `budget`.

    Raises:
        ShearingError: something that the user can mend, by the keys of the run.
    """
    run = RunDirectory(recipe.run_dir)
    if "compact" in recipe.stages:
        run.read_complete("compact")
    with named_as_in_a_run():
        make_sparse(one_shot_recipe(recipe), console=console)
    complete = {"budget": read_manifest(run.sparse)["budget"]}
    run.mark_complete("sparsify", complete)
    return complete


def one_shot_recipe(recipe: Recipe) -> SparsifyRecipe:
    """The recipe of `shear sparsify` that does what a run's stage does.

    Raises:
        ShearingError: the run has no such stage.
    """
    run, section = RunDirectory(recipe.run_dir), recipe.sparsify
    if section is None:
        raise ShearingError(
            "sparsify", value=None, allowed="the section sparsify", mend="add it: criterion, and sparsity or pattern"
        )
    cut = "compact" in recipe.stages
    corpus: list[Path] | None = [recipe.data.corpus] if section.needs_text else None
    return SparsifyRecipe.model_validate(
        {
            **section.model_dump(),
            "model": str(run.compact) if cut else recipe.model.source,
            "revision": None if cut else recipe.model.revision,
            "output": run.sparse,
            "calibration": section.calibration or corpus,
            "seed": recipe.seed,
            "device": recipe.training.device,
        }
    )


def require_possible(recipe: Recipe, *, config: PretrainedConfig) -> None:
    """Check what can be of one-shot sparsity in a run before there is the model that it prunes.

    Args:
        recipe: with the section `sparsify`.
        config: of the model that it will prune.

    Raises:
        ShearingError: the pattern does not fit a matrix, or the model cannot read so long a sequence.
    """
    one_shot, longest = one_shot_recipe(recipe), config.max_position_embeddings
    if one_shot.needs_text and one_shot.seqlen is not None and one_shot.seqlen > longest:
        raise ShearingError(
            "sparsify.seqlen",
            value=one_shot.seqlen,
            allowed=f"at most {longest}, what the model can read (max_position_embeddings)",
            mend=f"set sparsify.seqlen={longest}",
        )
    if one_shot.kept_of is None:
        return
    pattern, layers = KeptOf(*one_shot.kept_of), f"{anatomy_of(config).layers}."
    for name, parameter in skeleton(config).named_parameters():
        module = name.removesuffix(".weight")
        chosen = any(fnmatchcase(module, each) for each in one_shot.include or ["*"])
        if parameter.ndim == 2 and name.startswith(layers) and chosen:
            if any(fnmatchcase(module, each) for each in one_shot.exclude):
                continue
            with named_as_in_a_run():
                pattern.check(rows=parameter.shape[0], columns=parameter.shape[1], name=name)


@contextlib.contextmanager
def named_as_in_a_run() -> Iterator[None]:
    """Errors of one-shot sparsity under the keys of a run's recipe."""
    try:
        yield
    except ShearingError as error:
        elsewhere = {"model": "model.source", "output": "run_dir", "device": "training.device"}
        name = elsewhere.get(error.field, error.field)
        if name.partition(".")[0] in OneShotRecipe.model_fields:
            name = f"sparsify.{name}"
        raise ShearingError(name, value=error.value, allowed=error.allowed, mend=error.mend) from error
