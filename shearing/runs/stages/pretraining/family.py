"""A family of sizes: how the units of the trained model are sorted, and the models that are cut out at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from shearing.data.corpus.corpus import whole_rows
from shearing.errors import ShearingError, named
from shearing.files.durable import flush_folder, flush_tree, write_json
from shearing.files.full_disk import full_disk_said
from shearing.files.tensors import read_header, write_tensors
from shearing.models.attention import attention_within_documents
from shearing.models.cutting import Selection, cut_config, cut_in_turn
from shearing.models.loading import load_config, skeleton
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.companions import copy_companions
from shearing.models.stored.saving import write_model
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.progress import activity
from shearing.pruning.calibration.text import first_samples
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.masking.nested import NestedMasking, nested_masks
from shearing.pruning.structured.masking.recipe import WHOLE, FamilyRecipe
from shearing.runs.context import RunContext
from shearing.runs.continuation.family import family_shapes, importance_of
from shearing.runs.stages.compact import LARGEST_DIFFERENCE, relative_difference
from shearing.runs.stages.pretraining.start import Start
from shearing.runs.stages.source_model import source_to_read
from shearing.training.checkpoints.checkpoints import no_space
from shearing.training.checkpoints.pieces import ShardedState

ROUNDED_DIFFERENCE = 0.05
"""As `LARGEST_DIFFERENCE`, of models in 16 bits: what is scaled in a cut is rounded anew."""

_MADE_FROM = "made_from"


def family_masking(context: RunContext, *, start: Start, model: PreTrainedModel) -> NestedMasking | None:
    """What trains the sizes of a family in turns, on a model that it masks in place; None: there is no family.

    Units are sorted once per run, and what each size keeps is in pretrain/family.safetensors.

    Args:
        context: of the run; each of its processes calls this.
        start: what training begins with.
        model: the same, as it is trained.

    Raises:
        ShearingError: see `family_shapes`.
    """
    family, processes = context.recipe.family, context.processes
    if family is None:
        return None
    shapes = family_shapes(context.recipe, source=context.config_as_cut)
    path, made = context.directory.family_masks, _made_from(context, family=family, shapes=shapes)
    if not processes.on_main(lambda: _made(path) == made):
        masks = _sorted_units(context, family=family, start=start, model=model, shapes=shapes)
        said = full_disk_said(lambda: no_space(context.directory.path))
        processes.on_main(said(lambda: _keep(path, masks, made=made)))
    return NestedMasking(
        MaskedModel(model),
        masks_in(path),
        shapes=shapes,
        weights={WHOLE: family.weight, **{name: size.weight for name, size in family.sizes.items()}},
        draws=family.draws,
        seed=context.recipe.seed,
        device=context.device,
    )


def masks_in(path: Path) -> dict[str, dict[str, Tensor]]:
    """What `family_masking` has written: of each size, from large to small, its masks by granularity."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in json.loads(read_header(path)[1]["sizes"])}
    for name, mask in load_file(path).items():
        size, _, unit = name.partition("/")
        found[size][unit] = mask
    return found


def write_family(
    context: RunContext,
    *,
    masking: NestedMasking,
    start: Start,
    state: ShardedState,
    dtype: torch.dtype,
) -> None:
    """Write run_dir/family as a whole or not at all: in a folder of its own each size, an ordinary model.

    Each is compared with the masked model: as in the final model's files, and under the masks that it was trained with.

    Args:
        context: of the run, whose final model is written.
        masking: of the sizes.
        start: what training began with.
        state: the last checkpoint.
        dtype: of the weights in the files.

    Raises:
        ShearingError: logits differ.
    """
    run = context.directory
    config = load_config(start.source, revision=start.revision)
    beside = run.path / ".family.partial"
    for folder in (beside, run.family):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        with full_disk_said(lambda: no_space(run.path)):
            for name, shape in family_shapes(context.recipe, source=context.config_as_cut).items():
                masks = masking.masks_of(name)
                assert masks is not None
                on_host = masks.to(torch.device("cpu"))
                weights = state.weights(prefix=PARAMETER_PREFIX)
                _write_size(config, weights, on_host, shape=shape, start=start, dtype=dtype, to=beside / name)
                difference = _check(run.model, on_host, small=beside / name, name=name, dtype=dtype)
                write_json(beside / name / "shape.json", _facts(config, shape=shape, difference=difference))
                context.console.print(
                    f"{name}: {shape.num_parameters() / 1e6:.1f} M parameters; logits equal those under its masks to "
                    f"{difference:.1e}",
                    soft_wrap=True,
                    highlight=False,
                )
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    flush_tree(beside)
    beside.rename(run.family)
    flush_folder(run.path)


def _facts(config: PretrainedConfig, *, shape: Shape, difference: float) -> dict[str, Any]:
    whole = Shape.of(config)
    return {
        "source": {**whole.sizes(), "parameters": whole.num_parameters()},
        "target": {**shape.sizes(), "parameters": shape.num_parameters()},
        "parameters_without_embeddings": shape.num_parameters(embeddings=False),
        "relative_logit_difference": difference,
    }


def _write_size(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    masks: Masks,
    *,
    shape: Shape,
    start: Start,
    dtype: torch.dtype,
    to: Path,
) -> None:
    """A layer at a time is in memory."""
    selection = Selection.of(masks, source=Shape.of(config), target=shape)
    small = skeleton(cut_config(config, selection=selection))
    small.config.use_cache = True
    cut = cut_in_turn(config, weights, masks=masks, selection=selection)
    write_model(small, to, weights=cut, dtype=dtype)
    copy_companions(start.folder, to=to)


def _check(whole: Path, masks: Masks, *, small: Path, name: str, dtype: torch.dtype) -> float:
    """How far the logits of a size are off those of the final model under its masks."""
    difference = relative_difference(
        *(AutoConfig.from_pretrained(folder) for folder in (whole, small)),
        files=sorted(whole.glob("*.safetensors")),
        small_files=sorted(small.glob("*.safetensors")),
        masks=masks,
    )
    largest = LARGEST_DIFFERENCE if dtype == torch.float32 else ROUNDED_DIFFERENCE
    if not difference <= largest:
        raise ShearingError(
            f"family.sizes.{name} (logits of the cut model)",
            value=difference,
            allowed=f"a relative difference to the masked model of at most {largest}",
            mend="the weights may hold NaN, or this family's anatomy is declared wrongly: please report it",
        )
    return difference


def _sorted_units(
    context: RunContext, *, family: FamilyRecipe, start: Start, model: PreTrainedModel, shapes: Mapping[str, Shape]
) -> dict[str, dict[str, Tensor]]:
    """The units of each size, by the importance that they have in the model that is trained."""
    name = importance_of(context.recipe, family=family)
    metric, mixture = metric_of(name), context.initial_mixture()
    samples = whole_rows(family.calibration_tokens, sequence_length=mixture.sequence_length)
    size = context.recipe.pretrain.micro_batch_size
    text = list(first_samples(mixture, samples=samples, micro_batch_size=size, device=context.device))
    evidence = Evidence(
        text=text if METRICS[name].reads_text else (),
        target=list(shapes.values())[-1],
        seed=context.recipe.seed,
        processes=context.processes,
    )
    source = context.recipe.model.model_copy(update={"source": start.source, "revision": start.revision})
    read = source_to_read(context, whole=lambda: model, model=source)
    whole = Shape.of(model.config)
    work = metric.units_of_work(whole, evidence=evidence)
    with (
        named({"initial_masks": "family.importance"}),
        attention_within_documents(read, on=context.document_rules.attention_within),
        activity(f"importance by {name}", total=work, console=context.console) as advance,
    ):
        scores = metric.scores(read, evidence=evidence, advance=advance)
    return nested_masks(scores, source=whole, shapes=shapes)


def _made_from(context: RunContext, *, family: FamilyRecipe, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """All that the units of the sizes depend on, beside the model that is trained."""
    recipe = context.recipe
    return {
        "metric": importance_of(recipe, family=family),
        "sizes": {name: shape.sizes() for name, shape in shapes.items()},
        "seed": recipe.seed,
        "corpus": context.corpus.fingerprint,
        "initial_weights": context.initial_weights,
        "sequence_length": recipe.data.sequence_length,
        "calibration_tokens": family.calibration_tokens,
        "attention": recipe.data.attention,
    }


def _made(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    made: dict[str, Any] = json.loads(read_header(path)[1][_MADE_FROM])
    return made


def _keep(path: Path, masks: Mapping[str, Mapping[str, Tensor]], *, made: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(
        path,
        {f"{name}/{unit}": mask.clone() for name, of_size in masks.items() for unit, mask in of_size.items()},
        metadata={_MADE_FROM: json.dumps(made, sort_keys=True), "sizes": json.dumps(list(masks))},
    )
