"""Cutting: the trained weights and the final masks of mask learning become a plain Hugging Face model."""

from __future__ import annotations

import copy
import shutil
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from shearing.errors import ShearingError, named
from shearing.files.durable import flush_folder, write_json
from shearing.models.cutting import Selection, compact as cut
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape, resolve_target
from shearing.models.stored.companions import copy_companions, folder_of
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
    config = copy.deepcopy(context.config)
    source = Shape.of(config)
    masks, target, selection = kept_units(context)

    config.use_cache = False
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model: PreTrainedModel = architecture.from_pretrained(
        None, config=config, state_dict=load_file(run.prune / "model.safetensors"), dtype=torch.float32
    ).eval()
    small = cut(model, masks=masks, selection=selection)
    difference = _relative_difference(model, masks, small)
    if not difference <= LARGEST_DIFFERENCE:
        raise ShearingError(
            "compact (logits of the cut model)",
            value=difference,
            allowed=f"a relative difference to the masked model of at most {LARGEST_DIFFERENCE}",
            mend="the weights of prune/ may hold NaN, or this family's anatomy is declared wrongly: please report it",
        )
    small.config.use_cache = True

    shape = {
        "source": {**source.sizes(), "parameters": source.num_parameters()},
        "target": {**target.sizes(), "parameters": target.num_parameters()},
        "parameters_without_embeddings": target.num_parameters(embeddings=False),
        "layers": [{"attention": a, "mlp": m} for a, m in selection.layers],
        "architecture": type(small).__name__,
        "source_architecture": type(model).__name__,
        "relative_logit_difference": difference,
    }
    beside = run.path / ".compact.partial"
    for folder in (beside, run.compact):
        if folder.exists():
            shutil.rmtree(folder)
    beside.mkdir(parents=True)
    write_model(small, beside)
    copy_companions(folder_of(recipe.model.source, revision=recipe.model.revision), to=beside)
    write_json(beside / "shape.json", shape)
    beside.rename(run.compact)
    flush_folder(run.path)
    run.mark_complete("compact", {"parameters": target.num_parameters()})
    context.console.print(
        f"Cut {source.num_parameters() / 1e6:.1f} M to {target.num_parameters() / 1e6:.1f} M parameters "
        f"({', '.join(f'{name} {size}' for name, size in target.sizes().items())}); "
        f"logits equal the masked model's to {difference:.1e}: {run.compact}"
    )
    if type(small) is not type(model):
        said = written_as(type(small).__name__, instead_of=type(model).__name__)
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
    source = Shape.of(context.config)
    masks = Masks(**_masks(load_file(context.directory.prune / "masks.safetensors")))
    shape = _target(context.recipe, masks, source=source, config=context.config)
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


@torch.no_grad()
def _relative_difference(model: PreTrainedModel, masks: Masks, small: PreTrainedModel) -> float:
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (1, CHECK_TOKENS), generator=generator)
    masked = MaskedModel(model)
    masked.set_masks(masks)
    expected = masked.model(input_ids=input_ids).logits.double()
    masked.release()
    found = small(input_ids=input_ids).logits.double()
    return float((found - expected).norm() / expected.norm())
