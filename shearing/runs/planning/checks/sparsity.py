"""What stays zero, and what is trained of a model's matrices."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from shearing.data.corpus.corpus import Corpus
from shearing.errors import ShearingError, named
from shearing.models.loading import skeleton
from shearing.models.shape import Shape, config_for
from shearing.models.stored.companions import folder_of
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS
from shearing.pruning.sparse.job import require_calibration, require_possible
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.stored.manifest import MANIFEST
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME, masks_file
from shearing.pruning.sparse.stored.trained import groups_of, masks_beside, require_masks_fit
from shearing.runs.names import ADAPTER_NAMES, COMPONENT_NAMES, ONE_SHOT_NAMES
from shearing.runs.recipe import Recipe, one_shot_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.training.adapters.recipe import adapter_name
from shearing.training.adapters.spp import require_rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def zeros_of(recipe: Recipe, *, config: PretrainedConfig, target: Shape | None) -> str | None:
    """What stays zero in training, in words; None where the model is dense."""
    if recipe.sparsify is not None:
        config = _after_cut(config, target=target)
        # What a budget leaves open is checked by the stage itself.
        _require_possible(recipe, config=config, sizes_known=recipe.target is None or target is not None)
        budget, pattern = recipe.sparsify.budget, recipe.sparsify.pattern
        share = f"{100 * float(1 - budget):g} %" if budget is not None else f"as {recipe.sparsify.allocation} says,"
        return f"{share} of the weights of matrices, by {recipe.sparsify.criterion}{f', {pattern}' if pattern else ''}"
    if recipe.prune is not None:
        return None
    if (masks := masks_beside(_source_folder(recipe))) is None:
        return None
    if recipe.family is not None:
        raise ShearingError(
            "source",
            value=f"{masks.parent} with {masks.name}",
            allowed="a dense model with a family: masks are of the whole model, and its sizes would have zeros without",
            mend=f"remove {masks.name} and {MANIFEST} there to let every weight be trained, or set family=null",
        )
    require_masks_fit(masks, model=skeleton(config))
    return f"what {masks} drops"


def _after_cut(config: PretrainedConfig, *, target: Shape | None) -> PretrainedConfig:
    """That of what is trained in the end, where its sizes are known."""
    if target is None:
        return config
    return config_for(config, shape=target, attention_layers=range(target.num_hidden_layers))


def zeros_lost(recipe: Recipe) -> Iterator[str]:
    """That a sparse source does not stay sparse where units are pruned."""
    if recipe.prune is None or not (masks := masks_file(_source_folder(recipe))).is_file():
        return
    again = "" if recipe.sparsify is not None else "; the section sparsify zeroes weights of what is cut"
    yield f"zeros: {masks} is left behind by prune, and what is 0 in the source is trained like all else{again}"


def _source_folder(recipe: Recipe) -> Path:
    return folder_of(recipe.model.source, revision=recipe.model.revision, also=[EARLIER_NAME, FILE_NAME])


def _require_possible(recipe: Recipe, *, config: PretrainedConfig, sizes_known: bool) -> None:
    """Check what can be of one-shot sparsity in a run before there is the model that it prunes.

    Args:
        recipe: with the section `sparsify`.
        config: of the model that it will prune.
        sizes_known: see `require_possible`.

    Raises:
        ShearingError: see `require_possible`; an allocation file is of another model, or its masks cannot move.
    """
    one_shot, run = one_shot_recipe(recipe), RunDirectory(recipe.run_dir)
    if run.is_complete("sparsify"):
        return
    if isinstance(one_shot.allocation, Path) and "compact" in recipe.stages and not run.is_complete("compact"):
        raise ShearingError(
            "sparsify.allocation",
            value=str(one_shot.allocation),
            allowed=f"{', '.join(ALLOCATIONS)}: a file is of one model and its weights, and what is cut is yet to be",
            mend=f"choose a rule; or cut first without sparsify, run `shear allocate {run.compact}`, and add sparsify "
            "with its file",
        )
    with named(ONE_SHOT_NAMES):
        levels = require_possible(one_shot, config=config, sizes_known=sizes_known)
    if recipe.pretrain.ast is not None and (others := [str(each) for each in levels if not isinstance(each, KeptOf)]):
        raise ShearingError(
            "pretrain.ast",
            value="a section",
            allowed=f"masks of N:M, and {one_shot.allocation} has {', '.join(others[:3])}",
            mend="run `shear allocate` with a pattern as 2:4, or set pretrain.ast=null",
        )


def require_calibration_text(recipe: Recipe, *, config: PretrainedConfig, corpus: Corpus | None) -> None:
    """The text that one-shot sparsity reads is there, and enough of it.

    Args:
        recipe: of a run.
        config: of the source.
        corpus: the run's; None: it cannot be opened, which is said of `data.corpus`.
    """
    if recipe.sparsify is None or RunDirectory(recipe.run_dir).is_complete("sparsify"):
        return
    one_shot = one_shot_recipe(recipe)
    of_run = one_shot.calibration == [recipe.data.corpus]
    if of_run and corpus is None:
        return
    with named(ONE_SHOT_NAMES):
        require_calibration(one_shot, config=config, corpus=corpus if of_run and recipe.data.domains is None else None)


def require_adapters(recipe: Recipe, *, config: PretrainedConfig, target: Shape | None) -> None:
    """Adapters have the layers that they are for, and what they are made with is installed.

    Args:
        recipe: of a run.
        config: of the source.
        target: what that is cut to; None where a budget leaves it open, or no units are pruned.

    Raises:
        ShearingError: they have not, or it is not.
    """
    adapters = recipe.pretrain.adapters
    if adapters is None:
        return
    section = f"pretrain.{adapter_name(adapters)}"
    if recipe.pretrain.lora is not None and find_spec("peft") is None:
        raise ShearingError(
            section,
            value=adapters.model_dump(),
            allowed="null: the package peft is not installed",
            mend="pip install 'shearing[lora]', or remove pretrain.lora to train all weights",
        )
    trained = skeleton(_after_cut(config, target=target))
    linear = {name: module for name, module in trained.named_modules() if isinstance(module, nn.Linear)}
    names = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    if unknown := sorted(set(adapters.targets) - set(names)):
        raise ShearingError(
            f"{section}.targets",
            value=adapters.targets,
            allowed=f"last parts of the names of linear layers: {', '.join(names)}",
            mend=f"remove {', '.join(unknown)}",
        )
    # Which outputs a budget leaves, the stage itself says.
    if recipe.pretrain.spp is not None and (recipe.prune is None or target is not None):
        chosen = [module for name, module in linear.items() if name.rpartition(".")[2] in adapters.targets]
        with named(ADAPTER_NAMES["spp"]):
            require_rank(recipe.pretrain.spp.rank, outputs=[module.out_features for module in chosen])


@named(COMPONENT_NAMES)
def require_moving(recipe: Recipe, *, source: Shape) -> None:
    """Masks that move have a sparse model of a family in which they can."""
    if recipe.pretrain.ast is None:
        return
    if source.num_experts:
        raise ShearingError(
            "ast",
            value=f"a section, for {source.family.model_type}",
            allowed="for a model whose MLPs are not made of experts: their matrices are in one tensor, and masks move "
            "inside of matrices",
            mend="leave pretrain.ast out: masks that stay work with experts too",
        )
    if recipe.sparsify is not None:
        return
    if recipe.prune is not None:
        raise ShearingError(
            "ast",
            value="a section",
            allowed="for a sparse model, and what is cut is a dense one",
            mend="add the section sparsify with a pattern as 2:4, or leave pretrain.ast out",
        )
    groups_of(_source_folder(recipe))
