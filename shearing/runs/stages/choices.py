"""How the units of a model of a run were chosen: by what scores, at what cost, and what to call it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from shearing.data.corpus.corpus import whole_rows
from shearing.files.full_disk import full_disk_said
from shearing.files.tensors import read_header, write_tensors
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import attention_within_documents
from shearing.models.cutting import Selection, compact, cut_config, cut_in_turn
from shearing.models.loading import skeleton
from shearing.models.masked import MaskedModel, Masks
from shearing.models.recipe import ModelRecipe
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import weights_by_name
from shearing.models.stored.saving import write_model
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from shearing.pruning.structured.learner import OPEN
from shearing.pruning.structured.masking.facts import MASKINGS
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.pruning.structured.refitting.linear import Refitted, refit, refit_cost
from shearing.pruning.structured.rounding import select
from shearing.runs.context import RunContext
from shearing.runs.planning.hardware import flops_of, teacher_flops_per_token, training_flops_per_token
from shearing.runs.stages.evaluation.recipe import Baseline
from shearing.runs.stages.source_model import load_source_model, model_to_read, shared_model, source_to_read
from shearing.training.checkpoints.checkpoints import no_space

START_SCORES = "start_scores.safetensors"
"""In the folder of mask learning: what graded the initial masks. Its metadata says which metric wrote it, from what."""

CUT = ".cut"
"""In the folder of a run, while several processes evaluate baselines: the last one that was cut."""

_MADE_FROM = "made_from"


def evidence_for(context: RunContext, *, metric: str, target: Shape | None) -> Evidence:
    """What a metric goes by in a run."""
    text = context.calibration_batches() if METRICS[metric].reads_text else ()
    return Evidence(text=text, target=target, seed=context.recipe.seed, processes=context.processes)


def made_from(context: RunContext, *, metric: str, target: Shape | None) -> dict[str, Any]:
    """All that scores of a run depend on, beside the source model."""
    recipe = context.recipe
    return {
        "metric": metric,
        "target": None if target is None else target.facts(),
        "seed": recipe.seed,
        "corpus": context.corpus.fingerprint,
        "initial_weights": context.initial_weights,
        "sequence_length": recipe.data.sequence_length,
        "calibration_tokens": recipe.pruning.prune.calibration_tokens,
        "attention": recipe.data.attention,
        **_basis(recipe.pruning.prune),
    }


def _basis(prune: PruneRecipe) -> dict[str, str]:
    return {} if prune.rotate == "none" else {"rotate": prune.rotate, "rotate_tied": prune.rotate_tied}


def kept_scores(context: RunContext, *, metric: str, target: Shape | None) -> Scores | None:
    """The scores that graded the start of mask learning, if this metric wrote them from the same things."""
    path = context.directory.prune / START_SCORES
    if not path.is_file():
        return None
    _, metadata = read_header(path)
    wanted = json.dumps(made_from(context, metric=metric, target=target), sort_keys=True)
    return load_file(path) if metadata.get(_MADE_FROM) == wanted else None


def keep_scores(context: RunContext, scores: Scores, *, metric: str, target: Shape | None) -> Path:
    """Write the scores that grade the start of mask learning, for `kept_scores`."""
    path = context.directory.prune / START_SCORES
    made = json.dumps(made_from(context, metric=metric, target=target), sort_keys=True)
    write_tensors(path, scores, metadata={"metric": metric, _MADE_FROM: made})
    return path


def refit_from_files(
    context: RunContext,
    *,
    masks: Masks,
    folder: Path,
    advance: Callable[[int], None] = lambda _: None,
    model: ModelRecipe | None = None,
) -> Refitted:
    """Refit the source under masks, layer by layer out of its files, and write what has become of each layer.

    Args:
        context: of the run; each of its processes calls this.
        masks: binary, on the device.
        folder: is made anew; one safetensors file for each layer that stays, fp32, by names of the model's parameters.
        advance: called with 1 after every layer.
        model: what stands for the source, as the source in another basis; None: itself.
    """
    prune = context.recipe.pruning.prune
    recipe, processes = model or context.recipe.model, context.processes
    read = model_to_read(context, source=recipe.source, revision=recipe.revision)
    layers = anatomy_of(read).layers

    def keep(index: int, layer: nn.Module) -> None:
        stays = any(kept is None or bool(kept[index]) for kept in (masks.attention, masks.mlp))
        if stays and index % processes.size == processes.rank:
            weights = {f"{layers}.{index}.{name}": weight.detach() for name, weight in layer.named_parameters()}
            with full_disk_said(lambda: no_space(folder.parent)):
                write_tensors(folder / f"{index:05d}.safetensors", weights)

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)

    processes.on_main(make)
    with attention_within_documents(read, on=context.document_rules.attention_within):
        found = refit(
            MaskedModel(read),
            masks=masks,
            batches=context.calibration_batches(),
            ridge=prune.refit_ridge,
            blocks=prune.block_refit,
            advance=advance,
            processes=processes,
            keep=keep,
        )
    processes.barrier()
    return found


@dataclass
class Source:
    """The source model and what is cut from it without training; loaded only when it is needed.

    Several processes score and refit together, each reading the source from its files layer by layer; what is cut they
    read from files too, in a folder that the next one takes (`CUT`).

    Attributes:
        context: of the run, with this source.
        graded: whether the scores that graded the start of the run's mask learning are of it.
    """

    context: RunContext
    graded: bool = True
    _model: PreTrainedModel | None = None
    _chosen: dict[str, tuple[Masks, Selection]] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        """As it is."""
        if self._model is None:
            self._model = source_to_read(self.context, whole=lambda: load_source_model(self.context))
        return self._model

    def cut(self, baseline: Baseline, *, target: Shape) -> PreTrainedModel:
        """The source cut to `target`, its units chosen by a baseline's metric."""
        masks, selection = self._choose(baseline.metric, target=target)
        here = masks.to(self.context.device)
        if self.context.processes.size > 1:
            self._write_cut(masks=masks, refitted_under=here if baseline.refitted else None, selection=selection)
            return model_to_read(self.context, source=str(self._place), revision=None)
        if not baseline.refitted:
            return compact(self.model(), masks=masks, selection=selection)
        model, self._model = self.model(), None  # its weights change in place
        masked = MaskedModel(model)
        with attention_within_documents(model, on=self.context.document_rules.attention_within):
            prune = self.context.recipe.pruning.prune
            refit(
                masked,
                masks=here,
                batches=self.context.calibration_batches(),
                ridge=prune.refit_ridge,
                blocks=prune.block_refit,
            )
        return compact(masked.release(), masks=masks, selection=selection)

    def cut_shared_out(self, baseline: Baseline, *, target: Shape) -> PreTrainedModel:
        """As `cut`, its layers shared out among several processes; see `shared_model`."""
        self.cut(baseline, target=target)
        return shared_model(self.context, source=str(self._place), revision=None, dtype=torch.float32)

    @property
    def _place(self) -> Path:
        return self.context.directory.path / CUT

    def _write_cut(self, *, masks: Masks, refitted_under: Masks | None, selection: Selection) -> None:
        """Put what a cut leaves of the source, or of what a refit under masks makes of it, into its folder."""
        context, source, model = self.context, self.context.recipe.model, self.model()
        context.processes.barrier()  # nobody reads the one before any more
        refitted = context.directory.path / ".refitted"
        if refitted_under is not None:
            refit_from_files(context, masks=refitted_under, folder=refitted)
            model = model_to_read(context, source=source.source, revision=source.revision, instead=refitted)

        def write() -> None:
            shutil.rmtree(self._place, ignore_errors=True)
            weights = cut_in_turn(model.config, weights_by_name(model), masks=masks, selection=selection)
            write_model(skeleton(cut_config(model.config, selection=selection)), self._place, weights=weights)
            shutil.rmtree(refitted, ignore_errors=True)

        context.processes.on_main(full_disk_said(lambda: no_space(context.directory.path))(write))

    def digest(self, baseline: Baseline, *, target: Shape) -> str:
        """See `Selection.digest`."""
        return self._choose(baseline.metric, target=target)[1].digest

    def _choose(self, metric: str, *, target: Shape) -> tuple[Masks, Selection]:
        if metric not in self._chosen:
            scores = self._scores(metric, target=target)
            self._chosen[metric] = select(scores, source=Shape.of(self.context.config), target=target)
        return self._chosen[metric]

    def _scores(self, metric: str, *, target: Shape) -> Scores:
        context = self.context
        # Those of a run that rotates are of other coordinates; baselines are cut from the source as it is.
        other = not self.graded or context.recipe.pruning.prune.rotate != "none"
        kept = None if other else kept_scores(context, metric=metric, target=target)
        if kept is not None:
            return kept
        evidence = evidence_for(context, metric=metric, target=target)
        with attention_within_documents(self.model(), on=context.document_rules.attention_within):
            return metric_of(metric).scores(self.model(), evidence=evidence)


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What mask learning of a run made of its start.

    Attributes:
        way: title of the way in which units went, see `MASKINGS`.
        learns: whether that way learns masks.
        started_by: title of the metric that graded the start; `OPEN` if none did.
        refitted: whether the weights that stay were refitted to the start.
        changed: units changed from the start, by granularity; empty where the run does not say, see
            `MaskLearner.summary`.
        tokens: trained on before the cut.
    """

    way: str
    learns: bool
    started_by: str
    refitted: bool
    changed: Mapping[str, int | str]
    tokens: int

    @classmethod
    def of(cls, context: RunContext, *, summary: Mapping[str, Any]) -> Learned:
        """Of a run.

        Args:
            context: of the run.
            summary: content of prune/summary.json.
        """
        prune = context.recipe.pruning.prune
        return cls(
            way=MASKINGS[prune.masks].title,
            learns=prune.masks == "learned",
            started_by=OPEN if prune.graded_by is None else METRICS[prune.graded_by].title,
            refitted=prune.refits(sequence_length=context.recipe.data.sequence_length),
            changed=summary.get("changed_from_start", {}),
            tokens=prune.total_steps(sequence_length=context.recipe.data.sequence_length)
            * prune.tokens_per_step(sequence_length=context.recipe.data.sequence_length),
        )

    @property
    def title(self) -> str:
        """What tables call the model that was cut: learned only where learning had a part in which units stay."""
        if not self.learns:
            return self.way
        if self.started_by == OPEN:
            return f"{self.way}, started open"
        if self.changed and not any(self.changed.values()):
            return f"chosen by {self.started_by}{', refitted' * self.refitted}{', trained' * bool(self.tokens)}"
        # Older runs do not say whether anything changed.
        return f"{self.way if self.changed else 'masks'}, started by {self.started_by}"


def choosing_flops(context: RunContext, *, metric: str | None, refitted: bool, target: Shape) -> float:
    """What it takes to choose units by a metric, and to refit the weights that stay.

    Args:
        context: of the run.
        metric: what chooses; None: nothing does, at no cost.
        refitted: whether the weights that stay are refitted.
        target: shape that is left.
    """
    prune, source = context.recipe.pruning.prune, Shape.of(context.config)
    length = context.recipe.data.sequence_length
    wanted = context.recipe.pruning.target.parameters is None
    flops = 0.0
    if metric is not None:
        evidence = evidence_for(context, metric=metric, target=target if wanted else None)
        flops += flops_of(metric_of(metric).cost(source, evidence=evidence), source, sequence_length=length)
    if refitted:
        tokens = whole_rows(prune.calibration_tokens, sequence_length=length) * length
        cost = refit_cost(
            source,
            target=target,
            text_tokens=tokens,
            ridge=prune.refit_ridge,
            blocks=prune.block_refit,
            sequence_length=length,
        )
        flops += flops_of(cost, source, sequence_length=length)
    return flops


def training_flops(context: RunContext, shape: Shape, *, tokens: int) -> float:
    """What training all weights of a shape on so many tokens takes, and what the run's teacher, if any, computes."""
    length = context.recipe.data.sequence_length
    of_teacher = teacher_flops_per_token(context.teacher_shape, distill=context.recipe.distill, sequence_length=length)
    return (training_flops_per_token(shape, sequence_length=length) + of_teacher) * tokens
