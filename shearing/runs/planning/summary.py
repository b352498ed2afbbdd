"""What a run will do, as the checks have found it, and how that is shown before it starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from shearing.data.corpus.corpus import Corpus
from shearing.models.shape import Shape
from shearing.runs.planning.plan import heldout_shares, heldout_updates, num_domains, reads_reference, validations
from shearing.runs.recipe import Recipe, TrainingStage
from shearing.runs.run_directory import Stage

WORTHWHILE_PASSES = 4
"""Passes over the same text up to which repeating it is nearly as good as new text (Muennighoff et al., arXiv
2305.16264)."""

WORTHWHILE_HELDOUT = 0.1
"""Share of a stage's training FLOPs that losses on held-out text may take without a word."""

NOT_EXPORTABLE = "a budget leaves each layer its own size, and no ordinary config can hold that"

NO_TEXT = "text: not known; domains, weights and passes over them are checked once the corpus is there"


@dataclass(frozen=True)
class TrainingPlan:
    """What a training stage will do: optimiser steps, tokens of one step, and passes over each domain.

    `heldout_share` is what held-out losses take, as a share of the training FLOPs (None: not known), `lower` how that
    becomes less. `passes` assumes that the mixture stays at its initial weights, `most_passes` of each domain by itself
    that it has the largest weight that the update rule can give it, all the time.
    """

    stage: Stage
    steps: int
    tokens_per_step: int
    heldout_share: float | None
    lower: str
    passes: Mapping[str, float]
    most_passes: Mapping[str, float]


@dataclass(frozen=True)
class Plan:
    """What a run will do and take.

    Attributes:
        source: shape of the source model.
        target: shape to reach, or None where a budget leaves it open or no units are pruned.
        budget: parameters to reach, embeddings included, where the recipe gives a budget.
        family: shapes of the smaller sizes that are trained inside the last, by name.
        zeros: in words, what stays zero in training; None for a dense model.
        teacher: in words, what is listened to; None: nothing.
        uniform: whether the result fits an ordinary config.
        tokens: training tokens of each domain; of none where the text is not there, or cannot be used.
        no_text: whether there is no folder of a corpus yet.
        weights: initial weight of each domain.
        largest: largest weight that the update rule can give each.
        training: the training stages in order.
        doubts: what keys say against each other, a sentence each.
        notes: what is to be said of the GPUs, the result and a sparse source, as a run starts too, a sentence each.
        disk, free: bytes that the rest of the run needs at most, and bytes that there are.
    """

    source: Shape
    target: Shape | None
    budget: int | None
    family: Mapping[str, Shape]
    zeros: str | None
    teacher: str | None
    uniform: bool
    tokens: Mapping[str, int]
    no_text: bool
    weights: Mapping[str, float]
    largest: Mapping[str, float]
    training: Sequence[TrainingPlan]
    doubts: Sequence[str]
    notes: Sequence[str]
    disk: int
    free: int


def training_plans(
    recipe: Recipe, *, corpus: Corpus | None, weights: Mapping[str, float], largest: Mapping[str, float]
) -> Iterator[TrainingPlan]:
    """Of each training stage in order.

    Args:
        recipe: of the run.
        corpus: None where it is not there: nothing is known of passes over domains.
        weights, largest: see `Plan`.
    """
    length = recipe.data.sequence_length
    domains = num_domains(recipe) if corpus is None else len(corpus.domains)
    shares = heldout_shares(recipe)
    for stage, settings in recipe.training_stages.items():
        steps, per_step = settings.total_steps(sequence_length=length), settings.tokens_per_step(sequence_length=length)
        rows = steps * per_step // length
        passes, most_passes = (
            {}
            if corpus is None
            else {name: rows * each[name] / corpus.train_rows(name, sequence_length=length) for name in corpus.domains}
            for each in (weights, largest)
        )
        yield TrainingPlan(
            stage=stage,
            steps=steps,
            tokens_per_step=per_step,
            heldout_share=shares[stage],
            lower=_lower(recipe, stage=stage, domains=domains or 1),
            passes=passes,
            most_passes=most_passes,
        )


def _lower(recipe: Recipe, *, stage: TrainingStage, domains: int) -> str:
    """The keys that make held-out losses of a stage cost less, of those that it reads."""
    ways, mixture, interval = [], recipe.mixture, "interval" if stage == "prune" else "pretrain_interval"
    updates = heldout_updates(recipe, stage=stage)
    if updates:
        ways.append("mixture.losses=training (no held-out updates)")
        ways.append(f"a longer mixture.{interval} (now {getattr(mixture, interval)})")
    if updates or stage == "prune" or reads_reference(recipe, stage=stage):
        ways.append(f"a smaller mixture.heldout_tokens (now {recipe.heldout_tokens(domains=domains):,})")
    if validations(recipe, stage=stage):
        ways.append(f"a longer {stage}.validation_interval (now {recipe.training_stages[stage].validation_interval})")
    return ", ".join([*ways[:-1], f"or {ways[-1]}"]) if len(ways) > 1 else "".join(ways)


def render(plan: Plan) -> RenderableType:
    """The plan as a short summary for a terminal."""
    shapes = Table("model", "parameters", "without embeddings", "shape", box=None, pad_edge=False, header_style="bold")
    shapes.add_row("source", *shape_cells(plan.source))
    if plan.target is not None:
        shapes.add_row("target", *shape_cells(plan.target))
    elif plan.budget is not None:
        open_sizes = "to be learned, then made uniform" if plan.uniform else "to be learned, free in each layer"
        shapes.add_row("target", f"{plan.budget:,} at most", "", open_sizes)
    for name, shape in plan.family.items():
        shapes.add_row(name, *shape_cells(shape))
    columns = ("stage", "steps", "tokens a step", "tokens", "held-out losses")
    stages = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for stage in plan.training:
        total, share = stage.steps * stage.tokens_per_step, stage.heldout_share
        extra = "n/a" if share is None else f"+{100 * share:.2g} % FLOPs"
        stages.add_row(stage.stage, f"{stage.steps:,}", f"{stage.tokens_per_step:,}", f"{total:,}", extra)
    disk = Text(f"disk: at most {gigabytes(plan.disk)} of {gigabytes(plan.free)} free")
    zeros: list[RenderableType] = [] if plan.zeros is None else [Text(f"zeros: {plan.zeros}; training keeps them"), ""]
    teacher: list[RenderableType] = [] if plan.teacher is None else [Text(f"teacher: {plan.teacher}"), ""]
    domains: list[RenderableType] = [_domains(plan), *map(Text, _repeats(plan)), ""] if plan.tokens else []
    if plan.no_text:
        domains = [NO_TEXT, ""]
    costly = list(map(Text, _costly(plan)))
    parts: list[RenderableType] = [shapes, "", *zeros, *teacher, stages, *costly, "", *domains, disk]
    parts += [Text(f"doubtful: {doubt}") for doubt in plan.doubts]
    parts += map(Text, plan.notes)
    if not plan.uniform:
        parts.append(Text(f"not exportable: {NOT_EXPORTABLE}; `shear prune` alone can run this recipe"))
    return Group(*parts)


def _costly(plan: Plan) -> Iterator[str]:
    """What to say of stages in which held-out losses take much of the time."""
    for stage in plan.training:
        if stage.heldout_share is not None and stage.heldout_share > WORTHWHILE_HELDOUT:
            share = f"{100 * stage.heldout_share:.0f} %"
            yield f"held-out losses add {share} to the training FLOPs of {stage.stage}; less: {stage.lower}"


def _domains(plan: Plan) -> Table:
    """Text, weights and passes of each domain: at its initial weight, and at the largest one that it can get."""
    table = Table("domain", box=None, pad_edge=False, header_style="bold")
    stages = [stage.stage for stage in plan.training]
    for name in (
        "training tokens",
        "weight",
        *(f"passes, {name}" for name in stages),
        "largest weight",
        "passes, at most",
    ):
        table.add_column(name, justify="right")
    for domain, tokens in plan.tokens.items():
        passes = [f"{stage.passes[domain]:.2f}" for stage in plan.training]
        most = sum(stage.most_passes[domain] for stage in plan.training)
        weights = f"{plan.weights[domain]:.3f}", f"{plan.largest[domain]:.3f}"
        table.add_row(domain, f"{tokens:,}", weights[0], *passes, weights[1], f"{most:.2f}")
    return table


def _repeats(plan: Plan) -> Iterator[str]:
    """What to say of domains that are walked through often; the stages walk on one after the other."""
    planned = {name: sum(stage.passes[name] for stage in plan.training) for name in plan.tokens}
    most = {name: sum(stage.most_passes[name] for stage in plan.training) for name in plan.tokens}
    often = [f"{name} ({passes:.1f} passes)" for name, passes in planned.items() if passes > WORTHWHILE_PASSES]
    if often:
        yield (
            f"repeated often: {', '.join(often)}. Up to about {WORTHWHILE_PASSES} passes repeated text is nearly "
            "as good as new, later ones add ever less (arXiv 2305.16264): prepare more text, or lower the weight"
        )
    perhaps = [f"{name} ({passes:.1f})" for name, passes in most.items() if passes > WORTHWHILE_PASSES >= planned[name]]
    if perhaps:
        yield f"more than {WORTHWHILE_PASSES} passes at the largest weight that the rule can give: {', '.join(perhaps)}"


def shape_cells(shape: Shape) -> tuple[str, str, str]:
    """A table's cells about a shape: parameters, those without embeddings, sizes."""
    sizes = (
        f"{shape.num_hidden_layers} layers, hidden {shape.hidden_size}, MLP {shape.intermediate_size}, "
        f"heads {shape.num_attention_heads} on {shape.num_key_value_heads} KV x {shape.head_dim}"
    )
    if shape.num_experts:
        sizes += (
            f", {shape.num_experts} experts, {shape.num_experts_per_tok} a token "
            f"({shape.active_parameters():,} parameters)"
        )
    return f"{shape.num_parameters():,}", f"{shape.num_parameters(embeddings=False):,}", sizes


def written_as(architecture: str, *, instead_of: str) -> str:
    """What is said of a result that is of another architecture than its source, whose config refuses its sizes."""
    return (
        f"written as {architecture}, which computes the same: in transformers the config of {instead_of} refuses "
        "these sizes"
    )


def gigabytes(count: int) -> str:
    """A number of bytes for people; in MB where tenths of a GB would not tell it from another."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
