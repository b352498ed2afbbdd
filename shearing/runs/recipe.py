"""A recipe: everything that defines a run, typed, documented and validated before anything expensive starts.

python -m shearing.runs.recipe docs/recipe.md     rewrites the reference of keys inside that file
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from shearing.data.recipe import PUBLISHED_HELDOUT_TOKENS, DataRecipe, MixtureRecipe, mixture_contradictions
from shearing.errors import CombinedShearingError, ShearingError
from shearing.models.recipe import ModelRecipe, TargetRecipe, target_contradictions
from shearing.objectives.recipe import SOURCE, DistillRecipe, distill_contradictions
from shearing.pruning.sparse.recipe import OneShotRecipe, SparsifyRecipe
from shearing.pruning.structured.masking.recipe import FamilyRecipe, family_contradictions
from shearing.pruning.structured.recipe import (
    PruneRecipe,
    estimator_contradictions,
    granularity_contradictions,
    masking_contradictions,
    refit_contradictions,
)
from shearing.runs.continuation.recipe import (
    CascadeRecipe,
    beside_a_family,
    cascade_contradictions,
    contradictions_on_the_way,
    split_list,
)
from shearing.runs.names import COMPONENT_NAMES, DISTILL_NAMES
from shearing.runs.run_directory import RunDirectory, Stage
from shearing.runs.search.recipe import SearchRecipe, search_contradictions
from shearing.runs.stages.evaluation.recipe import EvaluationRecipe
from shearing.settings.document import embed_reference, keys, to_yaml
from shearing.settings.mistakes import located
from shearing.settings.neutral import Neutral
from shearing.settings.quantities import Duration
from shearing.settings.reading import Places, apply_overrides, read_recipe_file
from shearing.settings.section import Section
from shearing.training.adapters.recipe import ADAPTERS, adapter_name
from shearing.training.engines.facts import ENGINES
from shearing.training.learning_rates import LearningRates
from shearing.training.recipe import PretrainRecipe, StageRecipe, TrainingRecipe

TrainingStage = Literal["prune", "pretrain"]


@dataclass(frozen=True)
class Pruning:
    """The sections of a recipe that learns masks."""

    target: TargetRecipe
    prune: PruneRecipe


class Recipe(Section):
    """A run: units pruned (`target` and `prune`), weights zeroed (`sparsify`), both or neither; then training."""

    name: Neutral[str] = Field(description="Name of the run.")
    run_dir: Neutral[Path] = Field(description="Folder of the run; relative to the working directory.")
    seed: int = Field(0, ge=0, description="Seeds masks, mixture and random baselines.")
    resume: Neutral[Literal["auto", "never"]] = Field(
        "auto", description="auto: continue what is there; never: refuse a folder that holds a run."
    )
    one_schedule: bool = Field(
        False,
        description="Whether learning rates go on across the cut: those of prune and pretrain together are then those "
        "of one run of their total length, with one warm-up and one end; shares are of both. The masks' own rates "
        "stay in prune.",
    )
    model: ModelRecipe
    data: DataRecipe
    target: TargetRecipe | None = None
    mixture: MixtureRecipe = MixtureRecipe()
    prune: PruneRecipe | None = None
    sparsify: OneShotRecipe | None = None
    pretrain: PretrainRecipe
    distill: DistillRecipe | None = None
    training: TrainingRecipe = TrainingRecipe()
    evaluation: Neutral[EvaluationRecipe] = EvaluationRecipe()
    search: Neutral[SearchRecipe | None] = None
    cascade: CascadeRecipe | None = None
    family: FamilyRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _targets_in_a_list(cls, data: Any) -> Any:
        return split_list(data) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _without_contradictions(self) -> Self:
        if errors := list(_contradictions(self)) or list(_contradictions_on_the_way(self)):
            raise CombinedShearingError(errors)
        return self

    @property
    def pruning(self) -> Pruning:
        """What mask learning and cutting need.

        Raises:
            ShearingError: this recipe learns no masks.
        """
        if self.target is None or self.prune is None:
            raise ShearingError(
                "prune",
                value=None,
                allowed="for this, a recipe that learns masks: one with the sections target and prune",
                mend="add them, as recipes/demo.yaml has them",
            )
        return Pruning(self.target, self.prune)

    @property
    def training_stages(self) -> dict[TrainingStage, StageRecipe]:
        """The stages that train, in order, with their settings."""
        stages: dict[TrainingStage, StageRecipe] = {"pretrain": self.pretrain}
        return stages if self.prune is None else {"prune": self.prune, **stages}

    def learning_rates(self, stage: TrainingStage) -> LearningRates:
        """The learning rate of each step of a training stage."""
        length = self.data.sequence_length
        names = list(self.training_stages)
        steps = [section.total_steps(sequence_length=length) for section in self.training_stages.values()]
        index, settings = names.index(stage), self.training_stages[stage]
        return LearningRates.of(
            settings,
            tokens_per_step=settings.tokens_per_step(sequence_length=length),
            before=sum(steps[:index]) if self.one_schedule else 0,
            after=sum(steps[index + 1 :]) if self.one_schedule else 0,
        )

    def heldout_tokens(self, *, domains: int) -> int:
        """Validation tokens of each domain that domain weights follow: `mixture.heldout_tokens`, or what auto means.

        Args:
            domains: how many there are.
        """
        mixture = self.mixture
        if mixture.heldout_tokens != "auto":
            return mixture.heldout_tokens
        if mixture.update == "constant" or mixture.losses == "training":
            return self.evaluation.tokens_per_domain
        most = min(
            self._read_between(stage, mixture.interval if stage == "prune" else mixture.pretrain_interval, share=0.1)
            for stage, settings in self.training_stages.items()
            # Of no steps there is no update that would have to be paid for.
            if settings.total_steps(sequence_length=self.data.sequence_length)
        )
        return max(self.data.sequence_length, min(PUBLISHED_HELDOUT_TOKENS, most // domains))

    def validation_tokens(self, stage: TrainingStage, *, domains: int) -> int | None:
        """Validation tokens of each domain that tell how a stage is doing, where nothing follows them.

        Args:
            stage: of the recipe.
            domains: how many there are.

        Returns:
            None: they are not read.
        """
        interval = self.training_stages[stage].validation_interval
        followed = self.mixture.update != "constant" and self.mixture.losses == "heldout"
        if interval is None or followed:
            return None
        most = self._read_between(stage, interval, share=0.05)
        return max(self.data.sequence_length, min(self.evaluation.tokens_per_domain, most // domains))

    def _read_between(self, stage: TrainingStage, interval: Duration, *, share: float) -> int:
        """Tokens whose forward pass takes a share of the training FLOPs of an interval: a third of a step's a token."""
        settings, length = self.training_stages[stage], self.data.sequence_length
        # What is longer than the stage is as long as the stage.
        steps = min(settings.in_steps(interval, sequence_length=length), settings.total_steps(sequence_length=length))
        return int(share * 3 * max(1, steps) * settings.tokens_per_step(sequence_length=length))

    @property
    def teacher(self) -> ModelRecipe | None:
        """The model that is listened to; None: there is none."""
        if self.distill is None or self.distill.teacher == SOURCE:
            return None if self.distill is None else self.model
        own = {"source": self.distill.teacher, "revision": self.distill.revision}
        return self.model.model_copy(update=own)

    @property
    def listens_online(self) -> bool:
        """Whether the model that is listened to reads along, instead of being read about."""
        return self.distill is not None and self.distill.listens_online

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of this run, in order."""
        pruning: tuple[Stage, ...] = () if self.prune is None else ("prune", "compact")
        sparsify: tuple[Stage, ...] = () if self.sparsify is None else ("sparsify",)
        return (*pruning, *sparsify, "pretrain", "evaluate")

    def to_yaml(self) -> str:
        """The fully resolved recipe, which loads to an equal one; every key is under a comment that says what it is."""
        return to_yaml(self)

    def flat(self) -> dict[str, Any]:
        """Dotted key -> plain value."""
        plain = self.model_dump(mode="json")
        result = {}
        for name, _ in keys(type(self)):
            value = plain
            for part in name.split("."):
                value = None if value is None else value[part]
            result[name] = value
        return result


def load_recipe(path: Path | str, *, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe: the YAML file first, then overrides on top of it.

    Args:
        path: YAML file; relative paths inside it are relative to the working directory.
        overrides: `dotted.key=value`, values in YAML, applied in order.

    Raises:
        ShearingError: all errors found, each with its place, its dotted key and the nearest valid key.
    """
    data, places = read_recipe_file(Path(path), overrides=overrides)
    return validated(data, places=places)


def overridden(recipe: Recipe, *, overrides: Sequence[str]) -> Recipe:
    """A recipe with overrides on top of it; see `load_recipe`."""
    data, places = recipe.model_dump(mode="json"), Places("recipe.yaml")
    apply_overrides(data, overrides, places=places)
    return validated(data, places=places)


def validated(data: dict[str, Any], *, places: Places) -> Recipe:
    """A recipe of plain data.

    Args:
        data: of all sections.
        places: where its keys were written.

    Raises:
        ShearingError: all errors found, see `load_recipe`.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        errors = located(error, model=Recipe, data=split_list(data), places=places)
    raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)


@dataclass(frozen=True)
class BatchSplit:
    """How one process computes its share of a step.

    Attributes:
        sequences: of this process in a step.
        micro_batch_size: sequences of one forward pass.
        accumulation: forward passes in a step.
    """

    sequences: int
    micro_batch_size: int
    accumulation: int


def split_batch(recipe: Recipe, *, stage: TrainingStage, num_processes: int) -> BatchSplit:
    """How `num_processes` share a stage's global batch; a process with less than one micro-batch takes a smaller one.

    Of a stage without steps, in which nothing is dealt, each takes a micro-batch.

    Raises:
        ShearingError: they cannot share it equally.
    """
    settings = recipe.training_stages[stage]
    if not settings.total_steps(sequence_length=recipe.data.sequence_length):
        size = settings.micro_batch_size
        return BatchSplit(sequences=size, micro_batch_size=size, accumulation=1)
    batch = settings.batch_size.in_sequences(sequence_length=recipe.data.sequence_length)
    if batch % num_processes:
        fitting = [count for count in range(1, batch + 1) if batch % count == 0]
        raise ShearingError(
            f"{stage}.batch_size",
            value=str(settings.batch_size),
            allowed=f"a multiple of the {num_processes} processes of this run, in sequences; it is {batch}",
            mend=f"start {_nearest(fitting, to=num_processes)} processes, or set {stage}.batch_size="
            f"'{-(-batch // num_processes) * num_processes} sequences' in a new run_dir",
        )
    share = batch // num_processes
    size = min(settings.micro_batch_size, share)
    fitting = [count for count in range(1, share + 1) if share % count == 0]
    if share % size:
        raise ShearingError(
            f"{stage}.micro_batch_size",
            value=settings.micro_batch_size,
            allowed=f"a divisor of the batch of {batch} sequences shared by {num_processes} process(es), {share} each: "
            + ", ".join(map(str, fitting)),
            mend=f"set {stage}.micro_batch_size={_nearest(fitting, to=size)}",
        )
    draws, named = 1, "prune.mask_draws"
    if isinstance(settings, PruneRecipe):
        draws = settings.mask_draws
    elif recipe.family is not None:
        draws, named = recipe.family.draws, "family.draws"
    if batch % draws or (batch // draws) % size:
        possible = [count for count in range(1, batch // size + 1) if batch % count == 0 and batch // count % size == 0]
        raise ShearingError(
            named,
            value=draws,
            allowed=f"a number of equal parts of the batch of {batch} sequences, each a multiple of the micro-batch of "
            f"{size}: {', '.join(map(str, possible))}",
            mend=f"set {named}={_nearest(possible, to=draws)}, or a smaller {stage}.micro_batch_size",
        )
    return BatchSplit(sequences=share, micro_batch_size=size, accumulation=share // size)


def _nearest(numbers: Sequence[int], *, to: int) -> int:
    return min(numbers, key=lambda number: abs(number - to))


def _contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    """What the types cannot say and needs neither model nor corpus: values that do not go together."""
    yield from _section_contradictions(recipe)
    if recipe.target is not None:
        wrong = list(_renamed(target_contradictions(recipe.target)))
        yield from wrong
        if recipe.prune is not None and not wrong:
            budget = recipe.target.parameters is not None
            yield from _renamed(estimator_contradictions(recipe.prune, budget=budget))
    if recipe.prune is not None:
        yield from _renamed(granularity_contradictions(recipe.prune))
        yield from _renamed(refit_contradictions(recipe.prune, sequence_length=recipe.data.sequence_length))
    yield from _renamed(mixture_contradictions(recipe.mixture, domains=recipe.data.domains))
    yield from _optional_contradictions(recipe)
    if recipe.data.attention == "documents" and recipe.model.attn_implementation == "eager":
        yield ShearingError(
            "model.attn_implementation",
            value="eager",
            allowed="sdpa or flash_attention_2 with data.attention=documents: eager would need an S x S mask",
            mend="set model.attn_implementation=sdpa",
        )
    of_stages = [
        error
        for name, stage in recipe.training_stages.items()
        for error in _stage_contradictions(stage, name=name, recipe=recipe)
    ]
    yield from of_stages or _rate_contradictions(recipe)
    if recipe.prune is not None and not of_stages:
        per_step = recipe.prune.tokens_per_step(sequence_length=recipe.data.sequence_length)
        budget = recipe.target is not None and recipe.target.parameters is not None
        found = masking_contradictions(recipe.prune, budget=budget, tokens_per_step=per_step)
        yield from _renamed(found, names={**COMPONENT_NAMES, "duration": "prune.duration"})
    read = {"evaluation.tokens_per_domain": recipe.evaluation.tokens_per_domain}
    if recipe.mixture.heldout_tokens != "auto":
        read["mixture.heldout_tokens"] = recipe.mixture.heldout_tokens
    if recipe.prune is not None:
        read["prune.calibration_tokens"] = recipe.prune.calibration_tokens
    for field, tokens in read.items():
        if tokens < recipe.data.sequence_length:
            length = recipe.data.sequence_length
            yield ShearingError(
                field, value=tokens, allowed=f"at least one sequence: {length} tokens", mend=f"write {length} or more"
            )


def _renamed(errors: Iterable[ShearingError], *, names: Mapping[str, str] = COMPONENT_NAMES) -> Iterator[ShearingError]:
    """Errors that a section finds in itself, under the keys of the whole recipe."""
    for error in errors:
        error.rename(names)
        yield error


def _below(section: str, errors: Iterable[ShearingError]) -> Iterator[ShearingError]:
    """Errors that name keys of a section, under its name."""
    for error in errors:
        yield ShearingError(f"{section}.{error.field}", value=error.value, allowed=error.allowed, mend=error.mend)


def _optional_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    """Of sections that need not be there."""
    if recipe.distill is not None:
        yield from _renamed(distill_contradictions(recipe.distill), names=DISTILL_NAMES)
    if recipe.search is not None:
        yield from _below("search", search_contradictions(recipe.search))
    if recipe.cascade is not None:
        yield from _cascade_contradictions(recipe, recipe.cascade)
    if recipe.family is not None:
        yield from _family_contradictions(recipe, recipe.family)


def _family_contradictions(recipe: Recipe, family: FamilyRecipe) -> Iterator[ShearingError]:
    yield from _below("family", family_contradictions(family))
    distill, target = recipe.distill, recipe.target
    adapters = {f"pretrain.{name}": getattr(recipe.pretrain, name) for name in (*ADAPTERS, "ist", "ast")}
    yield from beside_a_family(
        {
            "cascade": recipe.cascade,
            "sparsify": recipe.sparsify,
            **adapters,
            "distill.hidden": None if distill is None else distill.hidden,
            "target.parameters": None if target is None else target.parameters,
            "target.vocab_size": None if target is None else target.vocab_size,
        }
    )


def _cascade_contradictions(recipe: Recipe, cascade: CascadeRecipe) -> Iterator[ShearingError]:
    if recipe.target is None or recipe.prune is None:
        yield ShearingError(
            "cascade",
            value="given",
            allowed="with the sections target and prune: a cascade cuts",
            mend="add them, or remove cascade",
        )
        return
    yield from _below("cascade", cascade_contradictions(cascade, target=recipe.target))
    for key, section in (
        ("sparsify", recipe.sparsify),
        ("pretrain.lora", recipe.pretrain.lora),
        ("distill.hidden", None if recipe.distill is None else recipe.distill.hidden),
    ):
        if section is not None:
            yield ShearingError(
                key,
                value="a section",
                allowed="none in a cascade, whose runs go on from what the one before has trained",
                mend=f"remove {key}, or cascade",
            )


def _contradictions_on_the_way(recipe: Recipe) -> Iterator[ShearingError]:
    """Of the runs before the last of a cascade, which have other targets and lengths."""
    if recipe.cascade is not None:
        found = contradictions_on_the_way(
            recipe.cascade,
            pretrain=recipe.pretrain,
            sequence_length=recipe.data.sequence_length,
            found=lambda changed: _contradictions(recipe.model_copy(update={"cascade": None, **changed})),
        )
        yield from _below("cascade", found)


def _section_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    if recipe.mixture.update != "constant" and recipe.mixture.reference == "teacher":
        if recipe.distill is None:
            yield ShearingError(
                "mixture.reference",
                value="teacher",
                allowed="teacher only with the section distill: there is no other teacher",
                mend="add the section distill, or set mixture.reference=source",
            )
        if recipe.mixture.losses != "training":
            yield ShearingError(
                "mixture.losses",
                value=recipe.mixture.losses,
                allowed="training with mixture.reference=teacher: both losses are of the tokens that are trained on",
                mend="set mixture.losses=training",
            )
    if (recipe.target is None) != (recipe.prune is None):
        absent, there = ("prune", "target") if recipe.prune is None else ("target", "prune")
        yield ShearingError(
            absent,
            value=None,
            allowed="both sections, target (the shape to reach) and prune (how masks are learned), or neither",
            mend=f"add {absent}, or remove {there} to prune no units",
        )
    if recipe.distill is not None and recipe.distill.hidden is not None and recipe.training.compile:
        yield ShearingError(
            "training.compile",
            value=True,
            allowed="false with distill.hidden, which listens to layers where a compiled one cannot be heard",
            mend="set training.compile=false, or leave distill.hidden out",
        )
    if recipe.prune is not None and recipe.prune.rotate != "none":
        yield from _rotation_contradictions(recipe, recipe.prune)
    yield from _adapter_contradictions(recipe)


def _rotation_contradictions(recipe: Recipe, prune: PruneRecipe) -> Iterator[ShearingError]:
    """What is of dimensions of the residual stream as they were before it is rotated."""
    if recipe.distill is not None and recipe.distill.hidden is not None:
        yield ShearingError(
            "prune.rotate",
            value="pca",
            allowed="none with distill.hidden, which compares the residual stream with the teacher's by dimension",
            mend="set prune.rotate=none, or leave distill.hidden out",
        )
    if prune.moments_of is not None:
        yield ShearingError(
            "prune.moments_of",
            value=str(prune.moments_of),
            allowed=f"null with prune.rotate={prune.rotate}: moments are of the weights in the basis of their training",
            mend="set prune.moments_of=null, or prune.rotate=none",
        )


def _adapter_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    """What is trained in place of all weights, and what goes with it."""
    pretrain, engine = recipe.pretrain, recipe.training.engine
    ways = [name for name in (*ADAPTERS, "ast") if getattr(pretrain, name) is not None]
    if len(ways) > 1:
        yield ShearingError(
            f"pretrain.{ways[1]}",
            value="a section",
            allowed=f"one of {', '.join([*ADAPTERS, 'ast'])}: pretrain.{ways[0]} is there too",
            mend=f"set pretrain.{ways[1]}=null, or pretrain.{ways[0]}=null",
        )
    if pretrain.adapters is not None and not ENGINES[engine].adapters:
        able = " or ".join(name for name, facts in ENGINES.items() if facts.adapters)
        yield ShearingError(
            f"pretrain.{adapter_name(pretrain.adapters)}",
            value=pretrain.adapters.model_dump(),
            allowed=f"training.engine={able}; it is {engine}, which holds trained weights alone",
            mend="set training.engine=torch, or training.engine=fsdp2 where the frozen weights do not fit one GPU",
        )
    if pretrain.ist is not None and (pretrain.adapters is None or engine != "torch"):
        yield ShearingError(
            "pretrain.ist",
            value="a section",
            allowed=f"with one of pretrain.{', pretrain.'.join(ADAPTERS)}, and with training.engine=torch, which can "
            f"let parameters rest; it is {engine}",
            mend="add pretrain.lora and set training.engine=torch, or set pretrain.ist=null",
        )
    one_shot = recipe.sparsify
    if pretrain.ast is None or one_shot is None or isinstance(one_shot.allocation, Path):
        return
    if one_shot.levels is None and one_shot.pattern is None:
        yield ShearingError(
            "pretrain.ast",
            value="a section",
            allowed="masks of N:M: one-shot sparsity without sparsify.pattern is unstructured",
            mend="set sparsify.pattern=2:4 and sparsify.sparsity=null, or pretrain.ast=null",
        )
    if unstructured := [level for level in one_shot.levels or () if ":" not in level]:
        yield ShearingError(
            "pretrain.ast",
            value="a section",
            allowed=f"masks of N:M, and sparsify.levels has {', '.join(unstructured[:3])}",
            mend='set sparsify.levels to N:M alone, as ["1:4","2:4","3:4"], or pretrain.ast=null',
        )


def _stage_contradictions(stage: StageRecipe, *, name: TrainingStage, recipe: Recipe) -> Iterator[ShearingError]:
    sequence_length = recipe.data.sequence_length
    least = 0 if isinstance(stage, PruneRecipe) else 1
    given = stage.duration.steps if stage.duration.tokens is None else stage.duration.tokens
    if given is None or given < least:
        yield ShearingError(
            f"{name}.duration",
            value=str(stage.duration),
            allowed=f"at least {('no', 'one')[least]} step, in steps or tokens",
            mend="write it as '3200 steps' or '0.4B tokens'",
        )
        return
    try:
        stage.tokens_per_step(sequence_length=sequence_length)
    except ShearingError as error:
        error.rename({**COMPONENT_NAMES, "batch_size": f"{name}.batch_size"})
        yield error
        return
    try:
        split_batch(recipe, stage=name, num_processes=1)
    except ShearingError as error:
        yield error
    steps = stage.total_steps(sequence_length=sequence_length)

    def length(duration: Duration) -> int:
        return stage.in_steps(duration, sequence_length=sequence_length)

    interval = "interval" if name == "prune" else "pretrain_interval"
    for field, duration in (
        (f"{name}.checkpoint_interval", stage.checkpoint_interval),
        (f"{name}.keep_every", stage.keep_every),
        (f"{name}.validation_interval", stage.validation_interval),
        (f"mixture.{interval}", getattr(recipe.mixture, interval)),
    ):
        if duration is not None and 0 in (duration.steps, duration.tokens, duration.fraction):
            yield ShearingError(field, value=str(duration), allowed="more than 0", mend="write a longer interval")
    if not isinstance(stage, PruneRecipe) or stage.masks != "learned":
        return
    if 0 < steps < length(stage.sparsity_warmup) + length(stage.freeze):
        yield ShearingError(
            f"{name}.sparsity_warmup",
            value=str(stage.sparsity_warmup),
            allowed=f"together with {name}.freeze = {stage.freeze} at most the stage's {steps} steps",
            mend="shorten one of the two, or write both as shares of the stage",
        )


def _rate_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    """Schedules that are longer than what they are of, or one schedule with two of something."""
    together = recipe.one_schedule and recipe.prune is not None
    for name, stage in recipe.training_stages.items():
        rates = recipe.learning_rates(name)
        whole = (
            f"the {rates.total_steps} steps of both stages" if together else f"the stage's {rates.total_steps} steps"
        )
        if rates.warmup_steps > rates.total_steps:
            yield ShearingError(
                f"{name}.warmup",
                value=str(stage.warmup),
                allowed=f"at most {whole}",
                mend="shorten it, or write a share of the stage as 3%",
            )
        elif stage.schedule == "wsd" and 0 in (stage.decay.steps, stage.decay.tokens, stage.decay.fraction):
            yield ShearingError(
                f"{name}.decay",
                value=str(stage.decay),
                allowed="more than 0 with schedule wsd",
                mend=f"set {name}.schedule=constant, which never decays, or a decay as 20%",
            )
        elif stage.schedule == "wsd" and rates.warmup_steps + rates.decay_steps > rates.total_steps:
            yield ShearingError(
                f"{name}.decay",
                value=str(stage.decay),
                allowed=f"together with {name}.warmup = {stage.warmup} at most {whole}",
                mend="shorten one of the two, or write both as shares as 20%",
            )
    if together:
        assert recipe.prune is not None
        yield from _two_schedules(recipe.prune, recipe.pretrain, sequence_length=recipe.data.sequence_length)


def _two_schedules(prune: StageRecipe, pretrain: StageRecipe, *, sequence_length: int) -> Iterator[ShearingError]:
    """What differs between two sections that are to follow one schedule."""
    keys = ["learning_rate", "schedule", "warmup"]
    keys += ["decay"] if prune.schedule == "wsd" else []
    keys += ["final_learning_rate"] if prune.schedule != "constant" else []
    of_batches = {stage.tokens_per_step(sequence_length=sequence_length) for stage in (prune, pretrain)}
    for name in [*keys, *(["batch_size"] if len(of_batches) > 1 else [])]:
        before, after = getattr(prune, name), getattr(pretrain, name)
        if before != after:
            yield ShearingError(
                f"pretrain.{name}",
                value=after if isinstance(after, float) else str(after),
                allowed=f"with one_schedule, what prune.{name} is: {before}",
                mend=f"set pretrain.{name}='{before}', or one_schedule=false",
            )


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
            "bos": recipe.data.bos if section.bos == "auto" else section.bos,
            "seed": recipe.seed,
            "device": recipe.training.device,
        }
    )


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(embed_reference(file.read_text(encoding="utf-8"), model=Recipe), encoding="utf-8")
