"""`shear data reference-loss`: measure models, fit a law to them, or take the source model's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shearing.data.corpus.bos import BosChoice
from shearing.data.mixture.reference import write_reference
from shearing.errors import ShearingError, named
from shearing.evaluation.reference_losses.chart import draw_laws, require_picture
from shearing.evaluation.reference_losses.fit import ReferenceFit, fit_reference, render
from shearing.evaluation.reference_losses.measure import measure_losses
from shearing.evaluation.reference_losses.table import LossTable
from shearing.models.loading import load_config
from shearing.models.shape import Shape, resolve_target
from shearing.progress import activity
from shearing.pruning.rotation.tied import config_as_cut
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import first_source
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.recipe import Recipe
from shearing.runs.stages.heldout import measure_heldout, steering_tokens, tokens_of_all
from shearing.runs.stages.source_model import load_source_model
from shearing.settings.quantities import parse_parameter_count
from shearing.training.device import keep_freed_memory, resolve_device, resolve_precision
from shearing.training.recipe import TrainingRecipe

MEASURE_NAMES: Mapping[str, str] = {
    "source": "--model",
    "corpus": "--corpus",
    "domains": "--domain",
    "sequence_length": "--sequence-length",
    "bos": "--bos",
    "device": "--device",
}
"""What components call, by the options of `shear data reference-loss measure`."""


@named(MEASURE_NAMES)
def measure(
    models: Sequence[str],
    *,
    corpus: Path,
    output: Path,
    domains: Sequence[str] | None,
    sequence_length: int,
    tokens_per_domain: int,
    micro_batch_size: int,
    training: TrainingRecipe,
    console: Console,
    bos: BosChoice = "auto",
) -> LossTable:
    """As `measure_losses`, on the device and in the precision of `training`; prints the table."""
    if not models:
        raise ShearingError("--model", value="nothing", allowed="at least one model", mend="add --model FOLDER")
    if min(tokens_per_domain, micro_batch_size) < 1 or sequence_length < 2:
        raise ShearingError(
            "--tokens, --micro-batch-size, --sequence-length",
            value=[tokens_per_domain, micro_batch_size, sequence_length],
            allowed="positive numbers, of --sequence-length at least 2",
            mend="correct them",
        )
    device = resolve_device(training.device)
    keep_freed_memory(device, processes=1)
    table = measure_losses(
        models,
        corpus=corpus,
        output=output,
        domains=domains,
        sequence_length=sequence_length,
        tokens_per_domain=tokens_per_domain,
        micro_batch_size=micro_batch_size,
        device=device,
        precision=resolve_precision(training, device=device),
        console=console,
        bos=bos,
    )
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("model", overflow="fold")
    for name in ("parameters", *table.domains):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in table.rows:
        shown.add_row(row.model, f"{row.parameters:,}", *(f"{row.losses[domain]:.4f}" for domain in table.domains))
    console.print(shown)
    console.print(f"{output}: {len(table.rows)} models", highlight=False, soft_wrap=True)
    return table


@named(COMPONENT_NAMES)
def fit(
    table: Path,
    *,
    at: str | None,
    recipe: Recipe | None,
    models: Sequence[str],
    bounded: bool,
    extrapolate: bool,
    output: Path | None,
    picture: Path | None,
    console: Console,
) -> ReferenceFit:
    """Fit a table and predict at a size; writes the reference and the picture that are asked for.

    Args:
        table: JSON or CSV, see `LossTable.read`.
        at: the size, as 1.3B; or
        recipe: whose target is meant.
        models: of the table; all if empty.
        bounded, extrapolate: see `fit_reference`.
        output: the reference file.
        picture: .png, .svg or .pdf.
        console: where the fit is shown.

    Raises:
        ShearingError: a table that cannot be read or fitted, no size or two, or a size outside of the table's.
    """
    if picture is not None:
        require_picture(picture)
    read = LossTable.read(table)
    parameters = _parameters(at, recipe=recipe)
    found = fit_reference(
        read.select(models) if models else read, parameters=parameters, bounded=bounded, extrapolate=extrapolate
    )
    console.print(render(found))
    if output is not None:
        found.write(output)
        console.print(f"{output}: for mixture.reference", highlight=False, soft_wrap=True)
    if picture is not None:
        draw_laws(found, path=picture)
        console.print(str(picture), highlight=False, soft_wrap=True)
    return found


@named(COMPONENT_NAMES)
def source(context: RunContext, *, output: Path) -> dict[str, float]:
    """Write the source model's own losses on validation text, as `mixture.reference: source` would measure them.

    Raises:
        ShearingError: the source or the corpus cannot be used.
    """
    recipe = context.recipe.model_copy(update={"model": first_source(context.recipe)})
    context = replace(context, recipe=recipe)
    corpus, console = context.corpus, context.console
    model, tokens = load_source_model(context), steering_tokens(context)
    total = tokens_of_all(context, tokens=tokens)
    with activity("held-out losses of the source", total=total, console=console) as advance:
        first = next(iter(recipe.training_stages))
        losses = measure_heldout(context, stage=first, model=model, tokens=tokens, advance=advance)
    write_reference(
        output,
        losses=losses,
        parameters=Shape.of(context.config).num_parameters(),
        method="the source model's own held-out loss",
        provenance={
            "model": recipe.model.source,
            "conditions": {
                "corpus_fingerprint": corpus.fingerprint,
                "tokenizer_fingerprint": next(iter(corpus.manifests.values())).tokenizer_fingerprint,
                "sequence_length": recipe.data.sequence_length,
                "tokens_per_domain": tokens,
                "precision": str(context.precision).removeprefix("torch."),
                "split": corpus.named_split("validation"),
                "attention": recipe.data.attention,
                "loss_across_documents": context.document_rules.heeding(corpus.bos).loss_across,
            },
        },
    )
    shown = Table("domain", "loss of the source", box=None, pad_edge=False, header_style="bold")
    for domain, loss in losses.items():
        shown.add_row(domain, f"{loss:.4f}")
    console.print(shown)
    console.print(f"{output}: for mixture.reference", highlight=False, soft_wrap=True)
    return losses


def _parameters(at: str | None, *, recipe: Recipe | None) -> int:
    if (at is None) == (recipe is None):
        raise ShearingError(
            "--at",
            value=at or "nothing",
            allowed="a size such as 1.3B, or --recipe RECIPE for its target, one of the two",
            mend="say for which size the reference is meant",
        )
    if at is not None:
        try:
            parameters = parse_parameter_count(at)
        except ValueError as error:
            raise ShearingError("--at", value=at, allowed="a size such as 1.3B", mend=str(error)) from error
        if parameters < 1:
            raise ShearingError("--at", value=at, allowed="at least 1", mend="write a size such as 1.3B")
        return parameters
    assert recipe is not None
    target = recipe.pruning.target
    if target.parameters is not None:
        return target.parameters
    stored = load_config(recipe.model.source, revision=recipe.model.revision)
    config = config_as_cut(stored, prune=recipe.prune)
    return resolve_target(target, source=config).num_parameters()
