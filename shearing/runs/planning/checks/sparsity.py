"""What stays zero, and what is trained of a model's matrices."""

from __future__ import annotations

from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from shearing.errors import ShearingError, named
from shearing.models.anatomy import anatomy_of
from shearing.models.loading import skeleton
from shearing.models.shape import Shape, config_for
from shearing.models.stored.companions import folder_of
from shearing.models.stored.headers import shapes_in_files
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME
from shearing.pruning.sparse.stored.trained import groups_of, masks_beside, require_masks_fit
from shearing.runs.names import ADAPTER_NAMES, COMPONENT_NAMES, ONE_SHOT_NAMES
from shearing.runs.recipe import Recipe, one_shot_recipe
from shearing.training.adapters.recipe import adapter_name
from shearing.training.adapters.spp import require_rank

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def zeros_of(recipe: Recipe, *, config: PretrainedConfig, target: Shape | None) -> str | None:
    """What stays zero in training, in words; None where the model is dense."""
    if recipe.sparsify is not None:
        if target is not None:
            config = config_for(config, shape=target, attention_layers=range(target.num_hidden_layers))
        if recipe.target is None or target is not None:  # what a budget leaves open is checked by the stage itself
            _require_possible(recipe, config=config)
        budget, pattern = recipe.sparsify.budget, recipe.sparsify.pattern
        share = f"{100 * float(1 - budget):g} %" if budget is not None else f"as {recipe.sparsify.allocation} says,"
        return f"{share} of the weights of matrices, by {recipe.sparsify.criterion}{f', {pattern}' if pattern else ''}"
    folder = Path(recipe.model.source)
    if recipe.prune is not None or not folder.is_dir() or (masks := masks_beside(folder)) is None:
        return None
    require_masks_fit(masks, model=skeleton(config))
    return f"what {masks} drops"


def _require_possible(recipe: Recipe, *, config: PretrainedConfig) -> None:
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
    family = anatomy_of(config)
    pattern, layers = KeptOf(*one_shot.kept_of), f"{family.layers}."
    router = None if family.mlp.experts is None else family.mlp.experts.spellings[0].parts[0]
    for name, shape in shapes_in_files(skeleton(config)).items():
        module = name.removesuffix(".weight")
        chosen = any(fnmatchcase(module, each) for each in one_shot.include or ["*"])
        if len(shape) == 2 and name.startswith(layers) and chosen and not (router and name.endswith(router)):
            if any(fnmatchcase(module, each) for each in one_shot.exclude):
                continue
            with named(ONE_SHOT_NAMES):
                pattern.check(rows=shape[0], columns=shape[1], name=name)


def require_adapters(recipe: Recipe, *, config: PretrainedConfig) -> None:
    """Adapters have the layers that they are for, and what they are made with is installed."""
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
    linear = {name: module for name, module in skeleton(config).named_modules() if isinstance(module, nn.Linear)}
    names = sorted({name.rpartition(".")[2] for name in linear} - {"lm_head"})
    if unknown := sorted(set(adapters.targets) - set(names)):
        raise ShearingError(
            f"{section}.targets",
            value=adapters.targets,
            allowed=f"last parts of the names of linear layers: {', '.join(names)}",
            mend=f"remove {', '.join(unknown)}",
        )
    # What is cut has other outputs; then the stage itself says so.
    if recipe.pretrain.spp is not None and recipe.prune is None:
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
    groups_of(folder_of(recipe.model.source, revision=recipe.model.revision, also=[EARLIER_NAME, FILE_NAME]))
