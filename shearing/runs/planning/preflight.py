"""Everything that can be checked and foreseen before the first expensive step, without loading weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from torch import nn

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.mixture.reference import resolve_reference
from shearing.data.mixture.rules.update import largest_weights, rule_of
from shearing.errors import CombinedShearingError, ShearingError, named
from shearing.evaluation.tasks.chosen import chosen_tasks
from shearing.evaluation.tasks.opening import open_harness
from shearing.models.anatomy import anatomy_of
from shearing.models.loading import require_weights, skeleton
from shearing.models.serving import BLOCK
from shearing.models.shape import Shape, config_for, other_architecture, resolve_target
from shearing.models.stored.companions import folder_of
from shearing.models.stored.headers import shapes_in_files
from shearing.models.stored.kept_tokens import require_cuttable
from shearing.models.stored.stored_model import require_finite
from shearing.models.tokenizer import load_tokenizer
from shearing.objectives.recipe import require_domains
from shearing.pruning.rotation.basis import require_rotatable
from shearing.pruning.rotation.tied import require_place_for_gain
from shearing.pruning.sparse.patterns import KeptOf
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME
from shearing.pruning.sparse.stored.trained import groups_of, masks_beside, require_masks_fit
from shearing.pruning.structured.granularities import PRUNED_BY, require_granularities, smallest_shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.mask_settings import MaskSettings, doubts
from shearing.pruning.structured.refitting.blocks import require_dense
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import require_shrinking
from shearing.runs.names import (
    ADAPTER_NAMES,
    COMPONENT_NAMES,
    DISTILL_NAMES,
    EVALUATION_NAMES,
    ONE_SHOT_NAMES,
    TEACHER_NAMES,
)
from shearing.runs.planning.capacity import Capacity, Devices, capacity
from shearing.runs.planning.disk import bytes_free, bytes_in, run_bytes
from shearing.runs.planning.plan import heldout_shares
from shearing.runs.planning.rows import rows_read
from shearing.runs.planning.summary import NOT_EXPORTABLE, Plan, TrainingPlan, gigabytes, written_as
from shearing.runs.recipe import Pruning, Recipe, one_shot_recipe, split_batch
from shearing.runs.run_directory import Stage
from shearing.training.adapters.recipe import adapter_name
from shearing.training.adapters.spp import require_rank
from shearing.training.engines.deepspeed_config import user_config
from shearing.training.engines.facts import ENGINES
from shearing.training.engines.fsdp2_engine import require_fsdp2
from shearing.training.recipe import DeepSpeedRecipe
from shearing.training.trackers import require_trackers

if TYPE_CHECKING:
    from transformers import PretrainedConfig


_Checked = TypeVar("_Checked")


@named(COMPONENT_NAMES)
def preflight(
    context: RunContext,
    *,
    stages: Sequence[Stage] | None = None,
    devices: Devices | None = None,
    starts: bool = True,
) -> Plan:
    """Check that `stages` can run: model, target, corpus, tokenizer, hardware, disk, permission.

    Args:
        context: of the run; what is opened for a check is there for the stages.
        stages: the stages that are about to run; all of the recipe's if None.
        devices: the GPUs that processes run on, one each; those of this machine if None.
        starts: whether they run now, on the context's processes. Otherwise all GPUs are taken to be used, and what they
            cannot hold is said, not refused.

    Raises:
        ShearingError: all that was found, together.
    """
    recipe = context.recipe
    stages = recipe.stages if stages is None else stages
    found: list[ShearingError] = []

    def attempt(check: Callable[[], _Checked]) -> _Checked | None:
        try:
            return check()
        except ShearingError as error:
            found.extend(error.errors if isinstance(error, CombinedShearingError) else [error])
            return None

    attempt(context.directory.require_writable)
    attempt(lambda: context.device)
    attempt(lambda: _require_engine(recipe))
    attempt(lambda: require_trackers(recipe.training))
    for stage in recipe.training_stages:
        if stage in stages:
            attempt(partial(split_batch, recipe, stage=stage, num_processes=context.processes.size))
    attempt(lambda: _require_exportable(recipe, stages=stages))
    if "evaluate" in stages:
        attempt(lambda: _require_tasks(recipe, last=len(stages) > 1))
    stored = attempt(lambda: context.config)
    if stored is None:
        raise _together(found)
    config = context.config_as_cut
    attempt(lambda: require_weights(recipe.model.source, revision=recipe.model.revision))
    attempt(lambda: _require_teacher(context))
    attempt(lambda: _require_context(recipe, config=config))
    source, whole = Shape.of(config), Shape.of(stored)
    target = None if recipe.prune is None else attempt(lambda: _target(recipe.pruning, config=config))
    attempt(lambda: require_shrinking(recipe, source=config))
    attempt(lambda: _require_metric(recipe, source=source))
    attempt(lambda: _require_rotatable(recipe, source=whole, target=target))
    attempt(lambda: _require_uncompiled(recipe, source=source))
    attempt(lambda: require_dense(source, blocks=None if recipe.prune is None else recipe.prune.block_refit))
    attempt(lambda: _require_vocabulary(recipe))
    attempt(lambda: _require_baselines(recipe, source=source))
    zeros = attempt(lambda: _zeros(recipe, config=config, target=target))
    attempt(lambda: _require_adapters(recipe, config=config))
    attempt(lambda: _require_moving(recipe, source=source))
    corpus = attempt(lambda: context.corpus)
    if corpus is None:
        raise _together(found)
    tokens = {domain: corpus.manifests[domain].train.tokens for domain in corpus.domains}
    attempt(lambda: context.outside)
    weights = attempt(lambda: context.initial_weights)
    if recipe.distill is not None:
        attempt(named(DISTILL_NAMES)(partial(require_domains, recipe.distill, domains=list(corpus.domains))))
        if set(recipe.training_stages) & set(stages):
            attempt(lambda: _require_cached(context))
    attempt(lambda: _require_reference(recipe, corpus=corpus))
    if found or weights is None:
        raise _together(found)
    gpus = _capacity(context, stages=stages, devices=devices or Devices.here(context.device), starts=starts)
    disk = max(0, run_bytes(recipe, source=source, target=target) - bytes_in(recipe.run_dir))
    largest = largest_weights(rule_of(recipe.mixture, prior=weights), prior=weights)
    plan = Plan(
        source=source,
        target=target,
        budget=None if recipe.target is None else recipe.target.parameters,
        zeros=zeros,
        teacher=None if recipe.distill is None else _teacher_in_words(context),
        uniform=recipe.target is None or target is not None or recipe.target.uniform,
        tokens=tokens,
        weights=weights,
        largest=largest,
        training=list(_training(recipe, corpus=corpus, weights=weights, largest=largest)),
        doubts=[*_doubts(recipe, source=whole, target=target), *_odd_sizes(recipe, source=source)],
        notes=[*gpus.notes, *_architecture(target, config=config)],
        disk=disk,
        free=bytes_free(recipe.run_dir),
    )
    if plan.disk > plan.free:
        raise ShearingError(
            "run_dir",
            value=str(recipe.run_dir),
            allowed=f"{gigabytes(plan.disk)} of free disk; there are {gigabytes(plan.free)}",
            mend="choose a run_dir on another disk, or lower prune.keep_last and pretrain.keep_last",
        )
    return plan


def _capacity(context: RunContext, *, stages: Sequence[Stage], devices: Devices | None, starts: bool) -> Capacity:
    """What GPUs cannot hold, refused where it is certain and the recipe does not want to try.

    Raises:
        ShearingError: they cannot.
    """
    if devices is None:
        return Capacity(unfit=None, notes=[])
    recipe = context.recipe
    processes = context.processes.size if starts else max(context.processes.size, devices.count)
    try:
        chosen = stages if starts else recipe.stages
        found = capacity(recipe, stages=chosen, processes=processes, devices=devices)
    except ShearingError:
        if starts:
            raise
        return Capacity(unfit=None, notes=[])  # processes that cannot share a batch: nobody has asked for so many
    if found.unfit is None:
        return found
    if starts and recipe.training.memory_check == "refuse":
        raise found.unfit
    return Capacity(unfit=found.unfit, notes=[f"too large: {found.unfit.allowed}; {found.unfit.mend}", *found.notes])


def _require_exportable(recipe: Recipe, *, stages: Sequence[Stage]) -> None:
    target = recipe.target
    if target is not None and target.parameters is not None and not target.uniform and set(stages) - {"prune"}:
        raise ShearingError(
            "target.uniform",
            value=False,
            allowed=f"true: {NOT_EXPORTABLE}",
            mend="set target.uniform=true, give sizes by name, or learn masks only with `shear prune`",
        )


@named(COMPONENT_NAMES)
def _require_vocabulary(recipe: Recipe) -> None:
    """A vocabulary that is cut in the end can be."""
    if recipe.target is not None and recipe.target.vocab_size is not None:
        folder = folder_of(recipe.model.source, revision=recipe.model.revision)
        require_cuttable(folder, size=recipe.target.vocab_size)


def _require_engine(recipe: Recipe) -> None:
    engine, settings = recipe.training.engine, recipe.training.deepspeed
    package = ENGINES[engine].package
    if engine == "deepspeed":
        user_config(settings)
    if package is not None and find_spec(package) is None:
        raise ShearingError(
            "training.engine",
            value=engine,
            allowed=f"torch: the package {package} is not installed",
            mend=f"pip install 'shearing[{package}]', or set training.engine=torch",
        )
    if engine == "deepspeed":
        _require_offloading(settings)
    if engine == "fsdp2":
        require_fsdp2()


def _require_offloading(settings: DeepSpeedRecipe) -> None:
    if settings.offload_parameters != "none" and settings.zero_stage != 3:
        raise ShearingError(
            "training.deepspeed.offload_parameters",
            value=settings.offload_parameters,
            allowed=f"none with zero_stage {settings.zero_stage}: only ZeRO-3 cuts up weights",
            mend="set training.deepspeed.zero_stage=3, or training.deepspeed.offload_parameters=none",
        )
    if settings.offload_optimizer != "none" and settings.zero_stage == 0:
        raise ShearingError(
            "training.deepspeed.offload_optimizer",
            value=settings.offload_optimizer,
            allowed="none with zero_stage 0",
            mend="set training.deepspeed.zero_stage=1 or higher",
        )


def _require_teacher(context: RunContext) -> None:
    """The model that is listened to says something of the same tokens, and its weights can be had.

    Raises:
        ShearingError: it has another vocabulary or tokenizer, reads too short a sequence, or its weights are not
            those of its config, or not finite.
    """
    recipe, config = context.recipe, context.teacher_config
    if recipe.distill is None or config is None or recipe.teacher is None:
        return
    said = recipe.distill.teacher

    def refuse(value: object, allowed: str, mend: str) -> ShearingError:
        return ShearingError("distill.teacher", value=f"{said}: {value}", allowed=allowed, mend=mend)

    if config.vocab_size != context.config.vocab_size:
        raise refuse(
            f"a vocabulary of {config.vocab_size:,} tokens",
            f"the source model's, of {context.config.vocab_size:,}: distributions are compared token by token",
            "choose a teacher of the same tokenizer, or leave distill.teacher out for the source model",
        )
    length, limit = recipe.data.sequence_length, getattr(config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise refuse(f"{limit} positions", f"at least data.sequence_length={length}", "choose another teacher")
    if recipe.distill.kind == "top_k" and recipe.distill.top_k >= config.vocab_size:
        raise ShearingError(
            "distill.top_k",
            value=recipe.distill.top_k,
            allowed=f"fewer than the vocabulary's {config.vocab_size} tokens",
            mend="lower it, or set distill.kind=forward_kl, which keeps all",
        )
    _require_matchable(context)
    if recipe.teacher == recipe.model:
        return  # what there is to check of the source model is checked where it is loaded
    with named(TEACHER_NAMES):
        tokenizer = load_tokenizer(recipe.teacher.source, revision=recipe.teacher.revision)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(context.tokenizer):
            raise refuse(
                "another tokenizer than the source model's",
                "the same tokens under the same numbers",
                "choose a teacher of the same tokenizer, or leave distill.teacher out for the source model",
            )
        # Of one that is not loaded, when the cache was written.
        if recipe.listens_online:
            require_weights(recipe.teacher.source, revision=recipe.teacher.revision)
        # Of the hub's, when it is loaded.
        if Path(recipe.teacher.source).is_dir() and recipe.listens_online:
            require_finite(Path(recipe.teacher.source))


def _require_matchable(context: RunContext) -> None:
    """Where residual streams are matched, the teacher's is that of the source.

    Raises:
        ShearingError: it is of another family, depth or width, or has no such layer.
    """
    distill, source, teacher = context.recipe.distill, Shape.of(context.config), context.teacher_shape
    if distill is None or distill.hidden is None or teacher is None:
        return
    if _stream(teacher) != _stream(source):
        raise ShearingError(
            "distill.hidden",
            value=f"with the teacher {distill.teacher}: {_stream(teacher)}",
            allowed=f"a teacher whose residual stream is the source model's ({_stream(source)}): the source itself, or "
            "what was trained on from it",
            mend="leave distill.hidden out, or distill.teacher",
        )
    layers = distill.hidden.layers
    if not isinstance(layers, str) and (beyond := [layer for layer in layers if layer >= source.num_hidden_layers]):
        raise ShearingError(
            "distill.hidden.layers",
            value=beyond,
            allowed=f"layers of the source model: 0 to {source.num_hidden_layers - 1}",
            mend="leave them out, or write all",
        )


def _stream(shape: Shape) -> str:
    return f"{shape.family.model_type}, {shape.num_hidden_layers} layers, hidden size {shape.hidden_size}"


def _require_cached(context: RunContext) -> None:
    """All rows that are known to be read are in the cache, where it has to be enough.

    Raises:
        ShearingError: they are not, or there is no such cache; see `RunContext.teacher_cache`.
    """
    recipe, cache = context.recipe, context.teacher_cache
    if cache is None or recipe.listens_online:
        return
    length = recipe.data.sequence_length
    sizes = {domain: context.corpus.train_rows(domain, sequence_length=length) for domain in context.corpus.domains}
    if all(cache.num_rows(domain) == size for domain, size in sizes.items()):
        return
    wanted = rows_read(context)
    if wanted is None:
        return  # which rows are read depends on losses: one that is missing is said when it is
    missing = {domain: len(np.setdiff1d(rows, cache.rows(domain))) for domain, rows in wanted.items()}
    if any(missing.values()):
        raise ShearingError(
            "distill.cache",
            value=f"{cache.path} without "
            + ", ".join(f"{count:,} rows of {domain}" for domain, count in missing.items() if count),
            allowed="all rows that this run reads, with distill.cache_missing=refuse",
            mend=f"write them: shear data teacher {recipe.data.corpus} --model {cache.name} --recipe RECIPE "
            f"-o {cache.path}; or set distill.cache_missing=compute, which loads the teacher",
        )


def _teacher_in_words(context: RunContext) -> str:
    distill, shape = context.recipe.distill, context.teacher_shape
    assert distill is not None
    assert shape is not None
    return (
        f"{distill.teacher}, {shape.num_parameters():,} parameters; {distill.kind} weighs {distill.weight:g} of the "
        f"loss at most" + ("" if distill.cache is None else f"; what it says is read from {distill.cache}")
    )


def _require_context(recipe: Recipe, *, config: PretrainedConfig) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and recipe.data.sequence_length > limit:
        raise ShearingError(
            "data.sequence_length",
            value=recipe.data.sequence_length,
            allowed=f"at most {limit}, the positions of the source model",
            mend=f"set data.sequence_length={limit} or less",
        )


def _require_metric(recipe: Recipe, *, source: Shape) -> None:
    """What grades the initial masks is for models of this family."""
    if recipe.prune is not None and (metric := recipe.prune.graded_by) is not None:
        metric_of(metric).units_of_work(source, evidence=Evidence())


@named(EVALUATION_NAMES)
def _require_tasks(recipe: Recipe, *, last: bool) -> None:
    """The tasks are there; with their text, where other stages come first, so that a run does not end in an error."""
    evaluation = recipe.evaluation
    if evaluation.tasks:
        tasks = chosen_tasks(evaluation.tasks)
        harness = open_harness(tasks, folder=evaluation.task_folder)
        for task in tasks if last else ():
            harness.load(task.name)


def _require_baselines(recipe: Recipe, *, source: Shape) -> None:
    """What chooses the units of baselines is for models of this family."""
    baselines = {} if recipe.prune is None else recipe.evaluation.by_name()

    def refusal(metric: str) -> ShearingError | None:
        try:
            metric_of(metric).units_of_work(source, evidence=Evidence())
        except ShearingError as error:
            return error
        return None

    found = {name: refusal(each.metric) for name, each in baselines.items()}
    refused = {name: error for name, error in found.items() if error is not None}
    if refused:
        left = ", ".join(name for name in baselines if name not in refused)
        raise ShearingError(
            "evaluation.baselines",
            value=list(refused),
            allowed="; ".join(dict.fromkeys(error.allowed for error in refused.values())),
            mend=f"set evaluation.baselines=[{left}]",
        )


def _require_rotatable(recipe: Recipe, *, source: Shape, target: Shape | None) -> None:
    if recipe.prune is not None and recipe.prune.rotate != "none":
        require_rotatable(source.family)
        require_place_for_gain(source, prune=recipe.prune, target=target)


def _require_uncompiled(recipe: Recipe, *, source: Shape) -> None:
    """Layers of experts are not compiled: which tokens an expert has is not known before the router has run."""
    if recipe.training.compile and source.num_experts:
        raise ShearingError(
            "training.compile",
            value=True,
            allowed=f"false with the experts of a {source.family.model_type}",
            mend="set training.compile=false",
        )


def _doubts(recipe: Recipe, *, source: Shape, target: Shape | None) -> Iterator[str]:
    if recipe.prune is not None:
        if recipe.prune.rotate != "none" and source.tied:
            head = source.vocab_size * (source if target is None else target).hidden_size
            yield (
                f"prune.rotate_tied=untie: the head becomes a matrix of its own, {head:,} of the result's parameters"
                if recipe.prune.unties
                else "prune.rotate_tied=diagonal: the last norm's gain is fitted, which changes logits"
            )
        if source.num_experts and recipe.prune.refits(sequence_length=recipe.data.sequence_length):
            yield (
                "prune.compensate refits what stays of the attention alone: experts and routers stay as they are, and "
                "what goes of them is made up for in training"
            )
        per_step = recipe.prune.tokens_per_step(sequence_length=recipe.data.sequence_length)
        settings = MaskSettings.of(recipe.prune, tokens_per_step=per_step, seed=recipe.seed)
        yield from doubts(settings, opens=recipe.prune.initial_masks == "open")


def _odd_sizes(recipe: Recipe, *, source: Shape) -> Iterator[str]:
    """Widths by name that other programs will not like, where the source's are better."""
    for name in ("hidden_size", "intermediate_size"):
        size = None if recipe.target is None else getattr(recipe.target, name)
        if size is not None and size % BLOCK and not getattr(source, name) % BLOCK:
            near = max(BLOCK, round(size / BLOCK) * BLOCK)
            yield (
                f"target.{name} = {size} is no multiple of {BLOCK}, by which quantisers store and GPUs multiply; "
                f"{near} is, and 64 or 256 suit more of them (docs/compatibility.md)"
            )


def _zeros(recipe: Recipe, *, config: PretrainedConfig, target: Shape | None) -> str | None:
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


def _require_adapters(recipe: Recipe, *, config: PretrainedConfig) -> None:
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
def _require_moving(recipe: Recipe, *, source: Shape) -> None:
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


def _architecture(target: Shape | None, *, config: PretrainedConfig) -> Iterator[str]:
    if target is not None and (other := other_architecture(target, source=config)) is not None:
        yield written_as(other, instead_of=type(skeleton(config)).__name__)


def _target(pruning: Pruning, *, config: PretrainedConfig) -> Shape | None:
    """The target shape, or None for a budget."""
    source, chosen, wanted = Shape.of(config), pruning.prune.granularities, pruning.target
    require_granularities(chosen, source=source)
    if wanted.parameters is not None:
        smallest = smallest_shape(chosen, source=source).num_parameters()
        if not smallest <= wanted.parameters < source.num_parameters():
            raise ShearingError(
                "target.parameters",
                value=wanted.parameters,
                allowed=f"from {smallest:,}, where these granularities have cut all they can, "
                f"to fewer than the source's {source.num_parameters():,}",
                mend="choose a budget in between",
            )
        return None
    require_granularities(chosen, source=source)
    target = resolve_target(wanted, source=config)
    for size, granularities in PRUNED_BY.items():
        if getattr(target, size) != getattr(source, size) and not set(granularities) & set(chosen):
            raise ShearingError(
                "prune.granularities",
                value=chosen,
                allowed=f"{' or '.join(granularities)} among them: the target's {size} is {getattr(target, size)}, "
                f"the source's {getattr(source, size)}",
                mend=f"add {granularities[0]}, or leave that size as it is",
            )
    if target == source:
        raise ShearingError(
            "target", value=target.sizes(), allowed="at least one size below the source's", mend="choose a smaller size"
        )
    return target


def _require_reference(recipe: Recipe, *, corpus: Corpus) -> None:
    if recipe.mixture.reference not in ("source", "online", "teacher"):
        resolve_reference(
            recipe.mixture,
            domains=corpus.domains,
            measure_source=dict,
            conditions={
                "tokenizer_fingerprint": next(iter(corpus.manifests.values())).tokenizer_fingerprint,
                "sequence_length": recipe.data.sequence_length,
            },
        )


def _training(
    recipe: Recipe, *, corpus: Corpus, weights: Mapping[str, float], largest: Mapping[str, float]
) -> Iterator[TrainingPlan]:
    length, mixture = recipe.data.sequence_length, recipe.mixture
    shares = heldout_shares(recipe)
    for stage, settings in recipe.training_stages.items():
        interval = "interval" if stage == "prune" else "pretrain_interval"
        lower = (
            f"mixture.losses=training (no held-out updates), a longer mixture.{interval} (now "
            f"{getattr(mixture, interval)}), or a smaller mixture.heldout_tokens (now "
            f"{recipe.heldout_tokens(domains=len(corpus.domains)):,})"
        )
        steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
        rows = steps * per_step // length
        passes, most_passes = (
            {name: rows * each[name] / corpus.train_rows(name, sequence_length=length) for name in corpus.domains}
            for each in (weights, largest)
        )
        yield TrainingPlan(
            stage=stage,
            steps=steps,
            tokens_per_step=per_step,
            heldout_share=shares[stage],
            lower=lower,
            passes=passes,
            most_passes=most_passes,
        )


def _together(errors: Sequence[ShearingError]) -> ShearingError:
    return errors[0] if len(errors) == 1 else CombinedShearingError(errors)
