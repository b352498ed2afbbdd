"""A recipe: everything that defines a run, typed, documented and validated before anything expensive starts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from shearing.errors import CombinedShearingError, ShearingError
from shearing.quantities import BatchSize, Duration, ParameterCount
from shearing.recipe_errors import located
from shearing.recipe_file import read_recipe_file
from shearing.recipe_section import Section
from shearing.recipe_text import keys, to_yaml
from shearing.run_directory import Stage
from shearing.sparsity.recipe import OneShotRecipe

TrainingStage = Literal["prune", "pretrain"]
GranularityName = Literal["layers", "sublayers", "kv_groups", "query_heads", "intermediate", "hidden"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0)]


class ModelRecipe(Section):
    """The source model."""

    source: str = Field(description="Folder or hub name of a Hugging Face causal language model.")
    revision: str | None = Field(None, description="Hub revision; only for hub names.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel.")


class DataRecipe(Section):
    """Tokenised domains."""

    corpus: Path = Field(description="Folder written by data_tools: one sub-folder per domain.")
    sequence_length: int = Field(4096, ge=2, description="Tokens per sequence; chosen here, not when tokenising.")
    domains: list[str] | None = Field(None, description="Domains to train on; all of the corpus if unset.")
    attention: Literal["full", "documents"] = Field(
        "full",
        description="full: a token attends to all tokens before it in its row (paper); documents: to those of its own "
        "document alone, in which positions count from 0.",
    )
    loss_across_documents: bool = Field(
        True,
        description="Whether the separator that ends a document has to predict the first token of the next one; "
        "false: that token does not count in any loss.",
    )


class TargetRecipe(Section):
    """The shape to reach: sizes by name (unset: as in the source), or a parameter budget alone."""

    num_hidden_layers: int | None = Field(None, ge=1, description="Layers kept.")
    hidden_size: int | None = Field(None, ge=1, description="Width of the residual stream.")
    intermediate_size: int | None = Field(None, ge=1, description="Units kept in each MLP.")
    num_attention_heads: int | None = Field(None, ge=1, description="Query heads kept in each layer.")
    num_key_value_heads: int | None = Field(None, ge=1, description="KV groups kept in each layer.")
    parameters: ParameterCount | None = Field(
        None, description="Parameter budget (64M, 1.3B), embeddings included; excludes every size above."
    )
    uniform: bool = Field(
        False,
        description="With `parameters`: project the learned sizes onto one size for all layers, "
        "the only kind of result that an ordinary config can hold.",
    )


class MixtureRecipe(Section):
    """Dynamic batch loading: which domain each sample comes from."""

    initial_weights: dict[str, float] | Literal["uniform", "proportional"] = Field(
        "proportional", description="Starting domain weights; proportional: by tokens in the corpus."
    )
    update: Literal["paper", "released", "bandit", "constant", "robust"] = Field(
        "paper",
        description="Rule that turns excess loss into new weights: paper (Sheared LLaMA, Algorithm 1), released (its "
        "published code), bandit (the same code, undocumented), constant, or robust (the worst mix near the initial "
        "one, after DRPruning).",
    )
    interval: Duration = Field(Duration(steps=50), description="Time between two updates (while pruning).")
    pretrain_interval: Duration = Field(Duration(steps=400), description="Time between two updates in pretraining.")
    step_size: Positive = Field(1.0, description="Multiplies the excess loss in the exponent; not with robust.")
    smoothing: Fraction = Field(
        1e-4, description="Share of the uniform mix blended into every update (c); not with robust."
    )
    divergence: Positive = Field(
        0.05,
        description="robust: largest chi-square divergence from the initial weights, 1/2 sum_i p_i (w_i / p_i - 1)^2 "
        "(rho of DRPruning, arXiv 2411.14055).",
    )
    floor: Fraction = Field(
        0.2, description="robust: least share of its initial weight that a domain keeps (DRPruning's code: 0.2)."
    )
    loss_ema: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.1,
        description="robust: share of the newest loss in the running loss (DRPruning: 0.1 of a step's training loss; "
        "its code takes held-out losses as they are: 1).",
    )
    reference: dict[str, float] | Path | Literal["source", "online"] = Field(
        "source",
        description="Reference loss of each domain: numbers, a JSON file (as of `shear data reference-loss`), the "
        "source model's own loss, or online: the loss at the target size at the end of the stage, predicted from the "
        "losses so far (after DRPruning), and the source's own until there are enough.",
    )
    losses: Literal["heldout", "training"] = Field(
        "heldout",
        description="Losses that the rule compares with the reference. heldout: measured at each update; training: a "
        "moving average of each domain's training loss, at no cost. While pruning that is the loss under masks drawn "
        "with noise, which is higher than that of the masks' means.",
    )
    ema: Positive = Field(
        0.1,
        le=1.0,
        description="Weight of a step's loss in the average of its domain (losses: training).",
    )
    heldout_tokens: int = Field(
        2_048_000, ge=2, description="Held-out tokens per domain read at each update (the paper's 500 x 4096)."
    )


class StageRecipe(Section):
    """What mask learning and continued pretraining have in common."""

    duration: Duration = Field(description="Length of the stage: '3200 steps' or '0.4B tokens'.")
    batch_size: BatchSize = Field(description="Global batch per step: '32 sequences' or '131072 tokens'.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward pass.")
    learning_rate: Positive = Field(1e-4, description="Peak learning rate of the weights.")
    warmup: Duration = Field(Duration(fraction=0.03), description="Linear warm-up of the learning rate.")
    final_learning_rate: Fraction = Field(0.1, description="Learning rate at the end of the cosine, share of the peak.")
    betas: tuple[BelowOne, BelowOne] = Field((0.9, 0.95), description="AdamW betas.")
    epsilon: Positive = Field(1e-8, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0.0, description="Decoupled weight decay of matrices.")
    gradient_clipping: float = Field(1.0, ge=0.0, description="Maximum norm of the weights' gradient; 0: none.")
    checkpoint_interval: Duration = Field(Duration(fraction=0.1), description="Time between two checkpoints.")
    keep_last: int = Field(2, ge=1, description="Checkpoints kept, newest first.")
    keep_every: Duration | None = Field(None, description="Checkpoints at multiples of this are kept for good.")


class PruneRecipe(StageRecipe):
    """Mask learning (Sheared LLaMA, section 2.1)."""

    granularities: list[GranularityName] = Field(
        ["layers", "kv_groups", "query_heads", "intermediate", "hidden"],
        description="What may be pruned; `sublayers` replaces `layers` to mask attention and MLP apart.",
    )
    mask_learning_rate: Positive = Field(0.1, description="Learning rate of log_alpha (the paper's: 1.0).")
    multiplier_learning_rate: Positive = Field(1.0, description="Learning rate (ascent) of the multipliers.")
    quadratic_penalty: float = Field(
        500.0,
        ge=0.0,
        description="Constant added to every lambda_2, so that sizes are held from the first step; paper: 0.",
    )
    temperature: Positive = Field(2 / 3, description="Temperature of the hard concrete distribution (beta).")
    sparsity_warmup: Duration = Field(
        Duration(steps=0), description="Linear ramp of the target sparsity; 0: a graded start is at the target."
    )
    initial_masks: Literal["open", "activations", "reconstruction"] = Field(
        "reconstruction",
        description="open: every unit alive (paper). Else graded by importance: layers and hidden dimensions by their "
        "activations; heads and intermediate units likewise (activations), or by what the others of their layer could "
        "not make up for (reconstruction).",
    )
    compensate: bool = Field(
        True,
        description="Before the first step, refit the weights that stay so that they make up for the units that a "
        "graded start closes (least squares, layer by layer); only with sparsity_warmup 0.",
    )
    log_alpha_limit: Positive = Field(
        10.0,
        description="log_alpha stays within plus and minus this; at the released code's 4.605 (ln 100) even a unit "
        "that is certain to stay is drawn below 1 in 4.7 % of all cases.",
    )
    warm_start_scale: Positive = Field(
        30.0, description="Steepness of a graded start: log_alpha falls by twice this from the best unit to the worst."
    )
    warm_start_step: float = Field(
        2.0, ge=0.0, description="Least fall of log_alpha from one unit to the next best in a graded start."
    )
    calibration_tokens: int = Field(
        65_536, ge=2, description="Tokens read for initial_masks and compensate: the first ones of training."
    )
    mask_draws: int = Field(
        1,
        ge=1,
        description="Draws of the masks' noise in a step, each for an equal share of its batch: more draws make the "
        "masks' gradient less noisy. The same draws whatever the number of processes and micro-batches.",
    )
    freeze: Duration = Field(
        Duration(fraction=0.5), description="Last stretch in which masks are fixed at the exact target shape."
    )


class LoraRecipe(Section):
    """Low-rank adapters are trained instead of all weights, and merged in the end (LoRA, arXiv 2106.09685)."""

    rank: int = Field(8, ge=1, description="Of the adapters.")
    alpha: Positive = Field(
        16.0, description="A weight changes by alpha / rank times the product of its adapter's two matrices."
    )
    dropout: BelowOne = Field(
        0.0,
        description="Share of the adapters' inputs zeroed in training; above 0 it costs a second product, and results "
        "depend on the number of processes.",
    )
    targets: list[str] = Field(
        ["q_proj", "v_proj"], min_length=1, description="Linear layers that get one, by the last part of their names."
    )


class PretrainRecipe(StageRecipe):
    """Continued pretraining of the cut or sparse model, or of the source itself; zeros of a sparse model stay."""

    optimizer: Literal["carried", "fresh"] = Field(
        "carried",
        description="carried: AdamW keeps what mask learning knew of each weight that was kept, as if there had been "
        "no cut; fresh: it starts anew (paper), which wants a warm-up. Without mask learning it always does.",
    )
    lora: LoraRecipe | None = None


class DeepSpeedRecipe(Section):
    """ZeRO: what of the training state is shared out among the processes."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="0: nothing; 1: optimiser state; 2: gradients too; 3: weights too."
    )
    offload_optimizer: Literal["none", "cpu"] = Field("none", description="Where the optimiser's state is kept.")
    offload_parameters: Literal["none", "cpu"] = Field("none", description="Where idle weights are kept (ZeRO-3).")
    config: Path | dict[str, Any] | None = Field(
        None, description="Further settings in DeepSpeed's own form, inline or a JSON file; they win over the defaults."
    )


class TrainingRecipe(Section):
    """How steps are computed; none of it changes what is computed beyond rounding."""

    engine: Literal["torch", "deepspeed"] = Field(
        "torch", description="torch: every process holds everything; deepspeed: ZeRO."
    )
    deepspeed: DeepSpeedRecipe = DeepSpeedRecipe()
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: fp32 weights under autocast; auto: bf16 where the hardware has it."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward pass recomputes in each layer; selective: all but the matrix products and "
        "attention.",
    )
    compile: bool = Field(False, description="torch.compile every decoder layer.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one.")
    loss_chunk_tokens: int = Field(1024, ge=1, description="Tokens whose logits exist at the same time.")
    max_skipped_steps: int = Field(10, ge=1, description="Non-finite steps in a row that stop the run.")
    log_interval: int = Field(
        10, ge=1, description="Steps between two reads of metrics from the device, each of which waits for it."
    )
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Where metrics go besides metrics.jsonl; each is a package of its own."
    )
    timeout: Positive = Field(1800.0, description="Seconds that a process waits for the others in one exchange.")


class EvaluationRecipe(Section):
    """Held-out evaluation of every model of the run."""

    tokens_per_domain: int = Field(65_536, ge=2, description="Held-out tokens per domain.")
    micro_batch_size: int = Field(4, ge=1, description="Sequences per forward pass.")
    baselines: list[Literal["random", "magnitude", "importance"]] = Field(
        ["random", "magnitude", "importance"], description="Same shape, units chosen otherwise, scored after cutting."
    )
    speed: bool = Field(True, description="Measure tokens/s and latency of source and result.")


@dataclass(frozen=True)
class Pruning:
    """The sections of a recipe that learns masks."""

    target: TargetRecipe
    prune: PruneRecipe


class Recipe(Section):
    """A run: units pruned (`target` and `prune`), weights zeroed (`sparsify`), both or neither; then training."""

    name: str = Field(description="Name of the run.")
    run_dir: Path = Field(description="Folder of the run; relative to the working directory.")
    seed: int = Field(0, ge=0, description="Seeds masks, mixture and random baselines.")
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue what is there; never: refuse a folder that holds a run."
    )
    model: ModelRecipe
    data: DataRecipe
    target: TargetRecipe | None = None
    mixture: MixtureRecipe = MixtureRecipe()
    prune: PruneRecipe | None = None
    sparsify: OneShotRecipe | None = None
    pretrain: PretrainRecipe
    training: TrainingRecipe = TrainingRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()

    @model_validator(mode="after")
    def _without_contradictions(self) -> Self:
        if errors := list(_contradictions(self)):
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
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        errors = located(error, model=Recipe, data=data, places=places)
    raise errors[0] if len(errors) == 1 else CombinedShearingError(errors)


def tokens_per_step(stage: StageRecipe, *, data: DataRecipe) -> int:
    """Tokens of one global batch of a stage.

    Raises:
        ShearingError: a batch in tokens that is no whole number of sequences.
    """
    return stage.batch_size.in_sequences(sequence_length=data.sequence_length) * data.sequence_length


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

    Raises:
        ShearingError: they cannot share it equally.
    """
    settings = recipe.training_stages[stage]
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
    draws = settings.mask_draws if isinstance(settings, PruneRecipe) else 1
    if batch % draws or (batch // draws) % size:
        possible = [count for count in range(1, batch // size + 1) if batch % count == 0 and batch // count % size == 0]
        raise ShearingError(
            "prune.mask_draws",
            value=draws,
            allowed=f"a number of equal parts of the batch of {batch} sequences, each a multiple of the micro-batch of "
            f"{size}: {', '.join(map(str, possible))}",
            mend=f"set prune.mask_draws={_nearest(possible, to=draws)}, or a smaller prune.micro_batch_size",
        )
    return BatchSplit(sequences=share, micro_batch_size=size, accumulation=share // size)


def _nearest(numbers: Sequence[int], *, to: int) -> int:
    return min(numbers, key=lambda number: abs(number - to))


def total_steps(stage: StageRecipe, *, data: DataRecipe) -> int:
    """Optimiser steps of a stage.

    Raises:
        ShearingError: as `tokens_per_step`.
    """
    return stage.duration.in_steps(tokens_per_step=tokens_per_step(stage, data=data))


def _contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    """What the types cannot say and needs neither model nor corpus: values that do not go together."""
    yield from _section_contradictions(recipe)
    if recipe.target is not None:
        yield from _target_contradictions(recipe.target)
    if recipe.prune is not None:
        yield from _granularity_contradictions(recipe.prune)
    yield from _mixture_contradictions(recipe)
    if recipe.data.attention == "documents" and recipe.model.attn_implementation == "eager":
        yield ShearingError(
            "model.attn_implementation",
            value="eager",
            allowed="sdpa or flash_attention_2 with data.attention=documents: eager would need an S x S mask",
            mend="set model.attn_implementation=sdpa",
        )
    for name, stage in recipe.training_stages.items():
        yield from _stage_contradictions(stage, name=name, recipe=recipe)
    read = {
        "evaluation.tokens_per_domain": recipe.evaluation.tokens_per_domain,
        "mixture.heldout_tokens": recipe.mixture.heldout_tokens,
    }
    if recipe.prune is not None:
        read["prune.calibration_tokens"] = recipe.prune.calibration_tokens
    for field, tokens in read.items():
        if tokens < recipe.data.sequence_length:
            length = recipe.data.sequence_length
            yield ShearingError(
                field, value=tokens, allowed=f"at least one sequence: {length} tokens", mend=f"write {length} or more"
            )


def _target_contradictions(target: TargetRecipe) -> Iterator[ShearingError]:
    sizes = sorted(name for name in TargetRecipe.model_fields if name not in ("parameters", "uniform"))
    given = [name for name in sizes if getattr(target, name) is not None]
    if target.parameters is not None and given:
        yield ShearingError(
            "target.parameters",
            value=target.parameters,
            allowed="either a budget or sizes by name",
            mend=f"remove target.parameters, or {', '.join(f'target.{name}' for name in given)}",
        )
    if target.parameters is None and not given:
        yield ShearingError(
            "target",
            value="empty",
            allowed=f"parameters, or at least one of {', '.join(sizes)}",
            mend="say what to reach, as parameters: 64M",
        )
    if target.uniform and target.parameters is None:
        yield ShearingError(
            "target.uniform",
            value=True,
            allowed="true only with target.parameters: sizes by name are the same in every layer anyway",
            mend="remove target.uniform",
        )


def _section_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    if (recipe.target is None) != (recipe.prune is None):
        absent, there = ("prune", "target") if recipe.prune is None else ("target", "prune")
        yield ShearingError(
            absent,
            value=None,
            allowed="both sections, target (the shape to reach) and prune (how masks are learned), or neither",
            mend=f"add {absent}, or remove {there} to prune no units",
        )
    if recipe.pretrain.lora is not None and recipe.training.engine != "torch":
        yield ShearingError(
            "pretrain.lora",
            value=recipe.pretrain.lora.model_dump(),
            allowed=f"training.engine=torch; it is {recipe.training.engine}, which would have to cut up frozen weights",
            mend="set training.engine=torch: adapters have so few weights that there is little to share out",
        )


def _granularity_contradictions(prune: PruneRecipe) -> Iterator[ShearingError]:
    chosen = prune.granularities
    if len(set(chosen)) < len(chosen) or not chosen:
        yield ShearingError(
            "prune.granularities",
            value=chosen,
            allowed="at least one granularity, each once",
            mend=f"write {list(dict.fromkeys(chosen)) or ['hidden']}",
        )
    if {"layers", "sublayers"} <= set(chosen):
        yield ShearingError(
            "prune.granularities",
            value=chosen,
            allowed="layers (attention and MLP go together) or sublayers (apart)",
            mend="remove one of the two",
        )


def _mixture_contradictions(recipe: Recipe) -> Iterator[ShearingError]:
    mixture, domains = recipe.mixture, recipe.data.domains
    yield from _rule_contradictions(mixture)
    if domains is not None and (not domains or len(set(domains)) < len(domains)):
        yield ShearingError(
            "data.domains", value=domains, allowed="at least one domain, each once", mend="leave it out to take all"
        )
    for field, values in (
        ("mixture.initial_weights", mixture.initial_weights),
        ("mixture.reference", mixture.reference),
    ):
        if not isinstance(values, dict):
            continue
        if not values or min(values.values()) <= 0:
            yield ShearingError(
                field,
                value=values,
                allowed="a positive number for each domain",
                mend="leave a domain out of data.domains rather than give it 0",
            )
        # A reference may know more domains than this run reads.
        unfit = set() if domains is None else set(domains) - set(values)
        if domains is not None and field == "mixture.initial_weights":
            unfit |= set(values) - set(domains)
        if domains is not None and unfit:
            yield ShearingError(
                field,
                value=sorted(values),
                allowed=f"the domains of data.domains: {', '.join(domains)}",
                mend=_domain_mend(values, domains=domains),
            )


def _rule_contradictions(mixture: MixtureRecipe) -> Iterator[ShearingError]:
    """Constants of another rule than the one chosen; with constant weights no constant says anything."""
    if mixture.update == "constant":
        return
    of_robust = ("divergence", "floor", "loss_ema")
    for name in ("step_size", "smoothing") if mixture.update == "robust" else of_robust:
        value, default = getattr(mixture, name), MixtureRecipe.model_fields[name].default
        if value != default:
            rules = "robust" if name in of_robust else "paper, released or bandit"
            yield ShearingError(
                f"mixture.{name}",
                value=value,
                allowed=f"only with mixture.update = {rules}; it is {mixture.update}",
                mend=f"set mixture.{name}={default}, or mixture.update={rules.partition(',')[0]}",
            )


def _domain_mend(values: dict[str, float], *, domains: Sequence[str]) -> str:
    missing, unknown = sorted(set(domains) - set(values)), sorted(set(values) - set(domains))
    parts = [f"add {', '.join(missing)}"] if missing else []
    for name in unknown:
        near = difflib.get_close_matches(name, domains, n=1)
        parts.append(f"remove {name}" + (f" (did you mean {near[0]}?)" if near else ""))
    return "; ".join(parts)


def _stage_contradictions(stage: StageRecipe, *, name: TrainingStage, recipe: Recipe) -> Iterator[ShearingError]:
    if stage.duration.fraction is not None or 0 in (stage.duration.steps, stage.duration.tokens):
        yield ShearingError(
            f"{name}.duration",
            value=str(stage.duration),
            allowed="at least one step, in steps or tokens",
            mend="write it as '3200 steps' or '0.4B tokens'",
        )
        return
    try:
        sequences = stage.batch_size.in_sequences(sequence_length=recipe.data.sequence_length)
    except ShearingError as error:
        yield ShearingError(f"{name}.batch_size", value=error.value, allowed=error.allowed, mend=error.mend)
        return
    try:
        split_batch(recipe, stage=name, num_processes=1)
    except ShearingError as error:
        yield error
    per_step = sequences * recipe.data.sequence_length
    steps = stage.duration.in_steps(tokens_per_step=per_step)

    def length(duration: Duration) -> int:
        return duration.in_steps(tokens_per_step=per_step, total_steps=steps)

    if length(stage.warmup) > steps:
        yield ShearingError(
            f"{name}.warmup",
            value=str(stage.warmup),
            allowed=f"at most the stage's {steps} steps",
            mend="shorten it, or write a share of the stage as 3%",
        )
    interval = "interval" if name == "prune" else "pretrain_interval"
    for field, duration in (
        (f"{name}.checkpoint_interval", stage.checkpoint_interval),
        (f"mixture.{interval}", getattr(recipe.mixture, interval)),
    ):
        if 0 in (duration.steps, duration.tokens, duration.fraction):
            yield ShearingError(field, value=str(duration), allowed="more than 0", mend="write a longer interval")
    if isinstance(stage, PruneRecipe) and length(stage.sparsity_warmup) + length(stage.freeze) > steps:
        yield ShearingError(
            f"{name}.sparsity_warmup",
            value=str(stage.sparsity_warmup),
            allowed=f"together with {name}.freeze = {stage.freeze} at most the stage's {steps} steps",
            mend="shorten one of the two, or write both as shares of the stage",
        )
