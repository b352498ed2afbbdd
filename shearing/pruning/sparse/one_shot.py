"""One-shot sparsity from beginning to end: what is checked first, where an interrupted run continues, what is said."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from shearing.data.corpus.bos import BosChoice
from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError, named
from shearing.evaluation.environment import environment
from shearing.evaluation.table import comparison_table
from shearing.files.durable import locked, read_json, require_new, require_writable, write_json
from shearing.files.full_disk import full_disk_said
from shearing.progress import activity, max_memory
from shearing.pruning.sparse.comparison import Stored, compare, open_heldout
from shearing.pruning.sparse.job import Job, disk_bytes, gather, no_room, prepare, require_same
from shearing.pruning.sparse.levels import choose_levels
from shearing.pruning.sparse.patterns import CUMULATIVE_TOLERANCE, Cumulative, pattern_of
from shearing.pruning.sparse.prune_layers import Method, prune_layers, units_of_work
from shearing.pruning.sparse.recipe import COMPONENT_NAMES, SparsifyRecipe
from shearing.pruning.sparse.stored.manifest import MANIFEST, in_short, read_manifest
from shearing.pruning.sparse.stored.pruned_layers import PrunedLayers
from shearing.pruning.sparse.stored.write import Done, write_output
from shearing.settings.quantities import format_parameters

EVALUATION = "evaluation.json"


@named(COMPONENT_NAMES)
def sparsify(
    recipe: SparsifyRecipe,
    *,
    console: Console | None = None,
    tokenizer: Any = None,
    corpus: Corpus | None = None,
    documents: DocumentRules | None = None,
) -> Path:
    """Prune a model in one shot and write it, with its masks and a manifest.

    The same call after any interruption continues behind the last layer that was finished, and ends in the same bits. A
    model that is there already is left as it is, and only compared with the dense one if the recipe says so.

    Args:
        recipe: what to do.
        console: where progress and results go; stdout if None.
        tokenizer: the model's, where it is loaded already.
        corpus: the calibration's, where it is open already; see `load_calibration`.
        documents: what their ends mean in it; see `load_calibration`.

    Returns:
        The folder of the sparse model.

    Raises:
        ShearingError: something the user can mend; all that can be is found before the first layer is computed.
    """
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    output, partial = recipe.output, recipe.output.with_name(f"{recipe.output.name}.partial")
    _require_place(output)
    require_writable(output, field="output")
    job = prepare(recipe, folder=partial, tokenizer=tokenizer, corpus=corpus, documents=documents)
    if job.source.structure is not None and (left_out := job.source.structure.left_out):
        said = f"left dense: {', '.join(left_out)}; include_towers=true prunes what is in them too"
        console.print(said, soft_wrap=True, highlight=False)
    heldout = None if recipe.evaluate is None else _heldout(recipe.evaluate, job=job, bos=recipe.bos)
    if (output / MANIFEST).is_file():
        require_same(read_manifest(output)["settings"], job.settings, where=output)
        console.print(f"{output} holds that model already", soft_wrap=True, highlight=False)
    else:
        with locked(partial, field="output"):
            _continue_or_begin(partial, job)
            started = time.monotonic()
            with full_disk_said(lambda: _no_room(partial, job=job)):
                manifest = _prune(recipe, job, partial=partial, console=console)
            _print_summary(manifest, seconds=time.monotonic() - started, console=console)
    shutil.rmtree(partial, ignore_errors=True)
    if heldout is not None:
        if heldout.notice:
            console.print(heldout.notice, style="yellow", soft_wrap=True, highlight=False)
        _evaluate(recipe, job, corpus=heldout, console=console)
    console.print(f"sparse model: {output}", soft_wrap=True, highlight=False)
    return output


def _prune(recipe: SparsifyRecipe, job: Job, *, partial: Path, console: Console) -> dict[str, Any]:
    gather(job, console=console)
    allocation = choose_levels(recipe, job=job, console=console)
    method = Method(job.criterion, job.reconstruction, allocation.patterns, recipe.damping, recipe.true_sequential)
    pruned_layers = PrunedLayers(partial / "blocks")
    total = units_of_work(job.source, method=method, calibration=job.calibration, compute=job.compute)
    with activity(f"{recipe.criterion}, {job.pattern_in_words}", total=total, console=console) as advance:
        prune_layers(
            job.source,
            method=method,
            calibration=job.calibration,
            compute=job.compute,
            pruned_layers=pruned_layers,
            advance=advance,
        )
    done = Done(
        settings=job.settings,
        method={
            "criterion": recipe.criterion,
            "reconstruction": recipe.resolved_reconstruction,
            "allocation": allocation.content["allocation"],
            "pattern": job.pattern_name,
            "pattern_in_words": job.pattern_in_words,
            "true_sequential": recipe.true_sequential,
        },
        calibration=None
        if job.calibration is None
        else {
            "source": job.calibration.source,
            "fingerprint": job.calibration.fingerprint,
            "samples": recipe.samples,
            "seqlen": job.seqlen,
            "seed": recipe.seed,
        },
        versions=environment(job.compute.device),
        budget=job.asked,
    )
    # Each file is copied, and read once more for its checksum.
    with activity("writing the sparse model", total=2 * job.source.weight_bytes(), console=console) as advance:
        return write_output(
            recipe.output,
            beside=partial / "model",
            source=job.source,
            matrices=job.matrices,
            pruned_layers=pruned_layers,
            done=done,
            allocation=allocation,
            advance=advance,
        )


def _require_place(output: Path) -> None:
    if not (output / MANIFEST).is_file():
        require_new(output, field="output")


def _continue_or_begin(partial: Path, job: Job) -> None:
    settings = partial / "settings.json"
    if settings.is_file():
        require_same(read_json(settings), job.settings, where=partial)
        return
    if shutil.disk_usage(partial).free < disk_bytes(job):
        raise _no_room(partial, job=job)
    write_json(settings, job.settings)


def _no_room(partial: Path, *, job: Job) -> ShearingError:
    searched = "" if job.fitness is None else f", or before it {len(job.levels)} levels, of which a search chooses"
    return no_room(partial, what=f"{disk_bytes(job) / 1e9:.2f} GB: the model, and its layers once more{searched}")


def _heldout(path: Path, *, job: Job, bos: BosChoice) -> Corpus:
    return open_heldout(
        path,
        tokenizer_folder=job.source.folder,
        vocab_size=job.source.config.get_text_config().vocab_size,
        sequence_length=job.seqlen,
        bos=bos,
    )


def _evaluate(recipe: SparsifyRecipe, job: Job, *, corpus: Corpus, console: Console) -> None:
    declared = job.source.structure is None
    models = {
        "dense": Stored(recipe.model, recipe.revision, declared=declared),
        in_short(read_manifest(recipe.output)): Stored(str(recipe.output), declared=declared),
    }
    tokens = corpus.heldout_tokens(split="test", sequence_length=job.seqlen, tokens_per_domain=recipe.evaluate_tokens)
    total = len(models) * tokens
    with activity("held-out losses, dense and sparse", total=total, console=console) as advance:
        evaluation = compare(
            models,
            corpus=corpus,
            tokens_per_domain=recipe.evaluate_tokens,
            sequence_length=job.seqlen,
            micro_batch_size=job.compute.micro_batch_size,
            device=job.compute.device,
            precision=job.compute.dtype,
            advance=advance,
        )
    write_json(recipe.output / EVALUATION, evaluation)
    console.print(comparison_table(evaluation).rich())


def _print_summary(manifest: dict[str, Any], *, seconds: float, console: Console) -> None:
    reached, model = manifest["budget"]["reached"], manifest["budget"]["of_all_parameters"]
    table = Table(title="sparsify complete", show_header=False, title_justify="left")
    table.add_row("method", f"{manifest['criterion']}, reconstruction {manifest['reconstruction']}")
    table.add_row("pattern", f"{manifest['pattern']}: {manifest['pattern_in_words']}")
    table.add_row("allocation", manifest["allocation"])
    table.add_row(
        "weights kept", f"{format_parameters(reached['kept'])} of {format_parameters(reached['of'])} in the matrices"
    )
    table.add_row(
        "sparsity", f"{100 * reached['sparsity']:.2f} % of them, {100 * model['sparsity']:.2f} % of all parameters"
    )
    if before := sum(about.get("zero_before", 0) for about in manifest["matrices"].values()):
        table.add_row("zero before", f"{format_parameters(before)} of them, which stay zero and count as removed")
    if missed := _missed_by(manifest["matrices"].values()):
        table.add_row("target missed", missed)
    spent = manifest["seconds"]
    table.add_row("time", f"{seconds:.1f} s; passes {spent['forward']:.1f} s, pruning itself {spent['metric']:.1f} s")
    table.add_row("peak memory", f"{max_memory() / 1e9:.2f} GB")
    console.print(table)


def _missed_by(matrices: Collection[Mapping[str, Any]]) -> str | None:
    """How far matrices of a manifest are from their share where the cumulative rule comes no nearer; None: none is."""
    distances = [
        abs(about["kept"] / math.prod(about["shape"]) - float(pattern.density))
        for about in matrices
        if isinstance(pattern := pattern_of(about["pattern"]), Cumulative)
    ]
    missed = [distance for distance in distances if distance > CUMULATIVE_TOLERANCE]
    if not missed:
        return None
    return (
        f"by up to {100 * max(missed):.2g} % of its weights in {len(missed)} of {len(matrices)} matrices (cumulative)"
    )
