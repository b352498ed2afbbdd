"""Cutting: the trained weights and the final masks of mask learning become a plain Hugging Face model."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel

from shearing.errors import ShearingError, named
from shearing.files.durable import flush_folder, flush_tree, write_json
from shearing.files.tensors import StoredTensors
from shearing.models.cutting import Selection, cut_config, cut_in_turn
from shearing.models.loading import load_source, paged_model, skeleton
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape, architecture_name, resolve_target
from shearing.models.stored.companions import copy_companions, folder_of
from shearing.models.stored.paging.paged import Pages
from shearing.models.stored.saving import write_model
from shearing.pruning.structured.rounding import shape_of
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.planning.summary import written_as
from shearing.runs.recipe import Recipe

CHECK_TOKENS = 64
LARGEST_DIFFERENCE = 1e-4
"""Relative difference of logits, masked against cut, above which the cut is refused; rounding is below 1e-5."""


@named(COMPONENT_NAMES)
def compact(context: RunContext) -> dict[str, Any]:
    """Writes run_dir/compact: the model, what lies beside the source, as tokenizer and licence, and shape.json.

    The folder appears as a whole or not at all. Before it does, the cut model's logits are compared with those of
    the masked model.

    Args:
        context: of a run whose `prune` stage is complete.

    Returns:
        The content of shape.json.

    Raises:
        ShearingError: pruning is not complete, or its masks have no uniform shape.
    """
    recipe, run = context.recipe, context.directory
    run.read_complete("prune")
    config = copy.deepcopy(context.config_as_cut)
    source = Shape.of(config)
    masks, target, selection = kept_units(context)
    architecture, source_architecture = map(architecture_name, (cut_config(config, selection=selection), config))

    beside = run.path / ".compact.partial"
    for folder in (beside, run.compact):
        if folder.exists():
            shutil.rmtree(folder)
    try:
        difference = _write_cut(config, run.prune / "model.safetensors", masks, selection, to=beside)
        shape = {
            "source": {**source.sizes(), "parameters": source.num_parameters()},
            "target": {**target.sizes(), "parameters": target.num_parameters()},
            "parameters_without_embeddings": target.num_parameters(embeddings=False),
            "layers": [{"attention": a, "mlp": m} for a, m in selection.layers],
            "architecture": architecture,
            "source_architecture": source_architecture,
            "relative_logit_difference": difference,
        }
        copy_companions(folder_of(recipe.model.source, revision=recipe.model.revision), to=beside)
        write_json(beside / "shape.json", shape)
        flush_tree(beside)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    beside.rename(run.compact)
    flush_folder(run.path)
    run.mark_complete("compact", {"parameters": target.num_parameters()})
    context.console.print(
        f"Cut {source.num_parameters():,} to {target.num_parameters():,} parameters "
        f"({', '.join(f'{name} {size}' for name, size in target.sizes().items())}); "
        f"logits equal the masked model's to {difference:.1e}: {run.compact}"
    )
    if architecture != source_architecture:
        said = written_as(architecture, instead_of=source_architecture)
        context.console.print(said, soft_wrap=True, highlight=False)
    return shape


class KeptUnits(NamedTuple):
    """What mask learning has left: its final masks, the shape they have, the units they keep."""

    masks: Masks
    shape: Shape
    selection: Selection


@named(COMPONENT_NAMES)
def kept_units(context: RunContext) -> KeptUnits:
    """Read what the `prune` stage of a run chose.

    Raises:
        ShearingError: its masks have no uniform shape.
    """
    source = Shape.of(context.config_as_cut)
    masks = Masks(**_masks(load_file(context.directory.prune / "masks.safetensors")))
    shape = _target(context.recipe, masks, source=source, config=context.config_as_cut)
    return KeptUnits(masks, shape, Selection.of(masks, source=source, target=shape))


def _masks(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if "/" not in name}


def _target(recipe: Recipe, masks: Masks, *, source: Shape, config: Any) -> Shape:
    wanted = recipe.pruning.target
    if wanted.parameters is None:
        return resolve_target(wanted, source=config)
    if not wanted.uniform:
        raise ShearingError(
            "target.uniform",
            value=False,
            allowed="true, as layers of different sizes have no place in an ordinary config",
            mend="set target.uniform=true (in a new run_dir) to end mask learning in one size for all layers; "
            "without it the result is prune/masks.safetensors alone",
        )
    return shape_of(masks, source=source)


def _write_cut(config: PretrainedConfig, trained: Path, masks: Masks, selection: Selection, *, to: Path) -> float:
    """Write the cut model, of which a layer at a time is in memory; returns how far its logits are off."""
    small = skeleton(cut_config(config, selection=selection))
    small.config.use_cache = True
    write_model(small, to, weights=cut_in_turn(config, StoredTensors(trained), masks=masks, selection=selection))
    files = sorted(to.glob("*.safetensors"))
    difference = relative_difference(config, small.config, files=[trained], small_files=files, masks=masks)
    if not difference <= LARGEST_DIFFERENCE:
        raise ShearingError(
            "compact (logits of the cut model)",
            value=difference,
            allowed=f"a relative difference to the masked model of at most {LARGEST_DIFFERENCE}",
            mend="the weights of prune/ may hold NaN, or this family's anatomy is declared wrongly: please report it",
        )
    return difference


@torch.no_grad()
def relative_difference(
    config: PretrainedConfig,
    small: PretrainedConfig,
    *,
    files: Sequence[Path],
    small_files: Sequence[Path],
    masks: Masks,
) -> float:
    """Of logits of random tokens, between a model under masks and a smaller one; a layer in memory at a time.

    Args:
        config, files: of the model that is masked.
        small, small_files: of the smaller one.
        masks: on the CPU.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    masked = MaskedModel(_opened(config, files))
    masked.set_masks(masks)
    expected = masked.model(input_ids=input_ids).logits.double()
    del masked
    found = _opened(small, small_files)(input_ids=input_ids).logits.double()
    return float((found - expected).norm() / expected.norm())


def _opened(config: PretrainedConfig, files: Sequence[Path]) -> PreTrainedModel:
    folder = str(files[0].parent)
    model = paged_model(config, files=files, source=folder, pages=Pages(torch.device("cpu")))
    return load_source(folder) if model is None else model  # its parameters are made of what is in the files
