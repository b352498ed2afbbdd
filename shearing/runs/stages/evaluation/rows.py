"""The models that a run has so far and their baselines: what each is called and cost, and how it is loaded."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shearing.files.durable import read_json
from shearing.files.states import states_of
from shearing.models.attention import requested
from shearing.models.recipe import ModelRecipe
from shearing.models.shape import Shape
from shearing.pruning.sparse.stored.manifest import in_short, read_manifest
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import runs_before
from shearing.runs.continuation.family import family_shapes, sorting_cost
from shearing.runs.planning.hardware import flops_of, rotation_flops
from shearing.runs.recipe import Recipe
from shearing.runs.stages.choices import Learned, Source, choosing_flops, made_from, training_flops
from shearing.runs.stages.evaluation.recipe import Baseline
from shearing.runs.stages.evaluation.units import Cut, digest_of
from shearing.runs.stages.source_model import load_source_model, model_to_read, shared_model
from shearing.training.device import memory_of
from shearing.training.recipe import StageRecipe

OF_RUN = ("source", "compact", "sparse", "final")
"""The names of rows that are no baselines, in the order in which a run makes them; sizes of a family come last."""

FAMILY = "family-"
"""What the names of their rows begin with."""

ON_THE_WAY = "cascade-"
"""What the names of rows of a cascade's earlier models begin with."""


@dataclass(frozen=True)
class Spent:
    """What a model has cost: tokens of training, and FLOPs of choosing its units, the refit and its training."""

    tokens: int = 0
    flops: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.tokens + other.tokens, self.flops + other.flops)


@dataclass(frozen=True)
class Row:
    """A model to measure.

    Attributes:
        group: of those of the same shape, at the same place of a run.
        flops: of choosing its units, the refit and its training.
        units: hash of the units that it kept, asked for once it is loaded; None: all.
        load: gives the model on each of the processes, all of which call it; on several of them its weights may come on
            demand.
        whole: gives it in this process's memory; None: `load` does.
        learned: what mask learning made of its start.
        shared: gives it with its layers shared out among several processes, all of which call this.
    """

    name: str
    label: str
    group: str
    shape: Shape
    training_tokens: int
    flops: float
    fingerprint: str
    load: Callable[[], PreTrainedModel]
    units: Callable[[], str | None] = lambda: None
    learned: Learned | None = None
    whole: Callable[[], PreTrainedModel] | None = None
    shared: Callable[[], PreTrainedModel] | None = None

    def load_whole(self) -> PreTrainedModel:
        """The model in the memory of this process, which alone may call this."""
        return self.load() if self.whole is None else self.whole()

    def load_shared(self) -> PreTrainedModel:
        """The model with its layers shared out among the processes, which are several and all call this."""
        assert self.shared is not None, "one process has nobody to share with"
        gc.collect()  # one that was shared out before refers to itself, and would keep its weights
        return self.shared()

    @property
    def of_run(self) -> bool:
        """Whether it is the source or one of the run's own models, and no baseline."""
        return self.name in OF_RUN or self.name.startswith((FAMILY, ON_THE_WAY))


def rows_of(context: RunContext) -> list[Row]:
    """The models that exist, in the order of the table.

    Of a cascade's run the source is that of the first, which baselines are cut from; what it was cut from itself, and
    the models before that, have rows of their own, and what they have cost counts for what came of them.
    """
    recipe, run = context.recipe, context.directory
    before = _runs_before(context)
    first = _in_place_of(context, before[0].recipe.model) if before else context
    model, source = first.recipe.model, Source(first, graded=not before)
    source_fingerprint = fingerprint_of(Path(model.source), model.revision)
    whole = Shape.of(first.config)
    alone = context.processes.size == 1
    rows = [Row("source", "source", "source", whole, 0, 0.0, source_fingerprint, source.model)]
    if not alone:
        shared = _sharing(context, source=model.source, revision=model.revision)
        rows = [replace(rows[0], whole=lambda: load_source_model(first), shared=shared)]
    learned: Learned | None = None
    units: Callable[[], str | None] = lambda: None  # noqa: E731

    def of_run(name: str, label: str, group: str, folder: Path) -> Row:
        def load() -> PreTrainedModel:
            return model_to_read(context, source=str(folder), revision=None)

        def in_memory() -> PreTrainedModel:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=requested(recipe.model.attn_implementation)
            )
            model.to(context.device)  # type: ignore[arg-type]
            return model

        shape = Shape.of(AutoConfig.from_pretrained(folder))
        mark = fingerprint_of(folder, None)
        loads = (in_memory, None, None) if alone else (load, in_memory, _sharing(context, source=str(folder)))
        return Row(name, label, group, shape, spent.tokens, spent.flops, mark, loads[0], units, learned, *loads[1:])

    spent, made_by, cuts = Spent(), list[str](), list[Cut]()
    shape = Shape.of(context.config)
    for each in before:
        name, after = each.directory.path.name, Shape.of(AutoConfig.from_pretrained(each.directory.model))
        if each.recipe.prune is not None:
            cuts = [*cuts, Cut(run=each.directory, source=Shape.of(each.config), shape=after)]
            spent += _spent_on_cut(each, shape=after)
        spent += _spent_on_training(each, shape=after)
        units = functools.partial(digest_of, cuts)
        made_by = [f"from {name}"]
        rows.append(of_run(f"{ON_THE_WAY}{name}", name, f"cascade {name}", each.directory.model))
    if recipe.prune is not None and run.is_complete("compact"):
        source_of_cut, shape = shape, Shape.of(AutoConfig.from_pretrained(run.compact))
        summary = run.prune / "summary.json"
        learned = Learned.of(context, summary=read_json(summary) if summary.is_file() else {})
        units = functools.partial(digest_of, [*cuts, Cut(run=run, source=source_of_cut, shape=shape)])
        spent += _spent_on_cut(context, shape=shape)
        made_by.append(learned.title)
        own = replace(shape, tied=whole.tied)  # cut from the source as it is, whatever a rotation does to the head
        rows += [
            _baseline(first, name, baseline, source=source, source_fingerprint=source_fingerprint, target=own)
            for name, baseline in recipe.evaluation.by_name().items()
        ]
        rows.append(of_run("compact", ", ".join(made_by), "cut", run.compact))
    if recipe.sparsify is not None and run.is_complete("sparsify"):
        made_by.append(in_short(read_manifest(run.sparse)))
        rows.append(of_run("sparse", ", ".join(made_by), "sparse", run.sparse))
    if run.is_complete("pretrain"):
        spent += _spent_on_training(context, shape=shape)
        rows.append(of_run("final", ", ".join([*made_by, "pretrained"]), "pretrained", run.model))
        if recipe.family is not None:
            # Chosen among the units that are left, at a cost that they share with the largest.
            learned, units = None, lambda: None
            rows += [
                of_run(f"{FAMILY}{name}", f"{name}, of the same training", f"size {name}", run.family / name)
                for name in recipe.family.sizes
            ]
    return rows


def _runs_before(context: RunContext) -> list[RunContext]:
    """Those of a cascade that led to this run's source, as if they were run here."""
    here = {"training": context.recipe.training}
    return [_quiet(context, each.model_copy(update=here)) for each in runs_before(context.recipe)]


def _in_place_of(context: RunContext, source: ModelRecipe) -> RunContext:
    """The run as if it had been cut from another source."""
    own = context.recipe.model.model_copy(update={"source": source.source, "revision": source.revision})
    return _quiet(context, context.recipe.model_copy(update={"model": own}))


def _quiet(context: RunContext, recipe: Recipe) -> RunContext:
    """A context beside the run's own, which has said already what both find."""
    return replace(context, recipe=recipe, console=Console(quiet=True))


def _spent_on_cut(context: RunContext, *, shape: Shape) -> Spent:
    """By a run until its source is cut to a shape."""
    prune, length = context.recipe.pruning.prune, context.recipe.data.sequence_length
    tokens, source = _tokens_of(prune, context.recipe), Shape.of(context.config)
    refitted = prune.refits(sequence_length=length)
    flops = choosing_flops(context, metric=prune.graded_by, refitted=refitted, target=shape)
    flops += rotation_flops(source, prune=prune, sequence_length=length)
    return Spent(tokens, flops + training_flops(context, source, tokens=tokens))


def _spent_on_training(context: RunContext, *, shape: Shape) -> Spent:
    """By a run on continued pretraining of a model of a shape."""
    recipe = context.recipe
    tokens = _tokens_of(recipe.pretrain, recipe)
    flops = training_flops(context, shape, tokens=tokens)
    if recipe.family is not None:
        smallest = list(family_shapes(recipe, source=context.config).values())[-1]
        cost = sorting_cost(recipe, family=recipe.family, shape=shape, smallest=smallest)
        flops += flops_of(cost, shape, sequence_length=recipe.data.sequence_length)
    return Spent(tokens, flops)


def _baseline(
    context: RunContext, name: str, baseline: Baseline, *, source: Source, source_fingerprint: str, target: Shape
) -> Row:
    wanted = made_from(context, metric=baseline.metric, target=target)
    fingerprint = f"{source_fingerprint} {name} {json.dumps(wanted, sort_keys=True)}"
    flops = choosing_flops(context, metric=baseline.metric, refitted=baseline.refitted, target=target)
    load = functools.partial(source.cut, baseline, target=target)
    units = functools.partial(source.digest, baseline, target=target)
    shared = functools.partial(source.cut_shared_out, baseline, target=target)
    return Row(name, baseline.title, "cut", target, 0, flops, fingerprint, load, units, shared=shared)


def _sharing(context: RunContext, *, source: str, revision: str | None = None) -> Callable[[], PreTrainedModel]:
    return functools.partial(shared_model, context, source=source, revision=revision, dtype=torch.float32)


def is_shared_out(context: RunContext, row: Row) -> bool:
    """Whether all processes have the layers of a model together when it answers tasks or writes; all call this."""
    evaluation, processes = context.recipe.evaluation, context.processes
    return processes.on_main(
        lambda: evaluation.shares_out(
            parameters=row.shape.num_parameters(),
            processes=processes.size,
            copies=context.precision == torch.bfloat16,
            memory=memory_of(context.device),
        )
    )


def fingerprint_of(source: Path, revision: str | None) -> str:
    """Tells a model from another in the same place: sizes and times of its weight files, or hub name and revision."""
    if not source.is_dir():
        return f"{source}@{revision}"
    weights = list(source.glob("*.safetensors")) or source.glob("*.bin")  # read where no others are
    return " ".join([str(source), *states_of(weights, within=source)])


def _tokens_of(stage: StageRecipe, recipe: Recipe) -> int:
    length = recipe.data.sequence_length
    return stage.total_steps(sequence_length=length) * stage.tokens_per_step(sequence_length=length)
