"""Evaluation of every model of a run: the source, baselines of the same shape, the cut, sparse and final models.

Each row is written as soon as it is measured and is kept as long as its settings and its model stay the same, so an
interrupted evaluation continues and one after more training only measures what is new.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from shearing.errors import named
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import DomainLoss, heldout_loss, macro_mean
from shearing.evaluation.speed import measure_speed
from shearing.evaluation.table import comparison_table
from shearing.evaluation.verdict import verdict
from shearing.files.durable import read_json, write_json
from shearing.models.stored.companions import folder_of
from shearing.models.stored.paging.on_demand import weights_by_name
from shearing.progress import activity
from shearing.pruning.sparse.stored.masks import EARLIER_NAME, FILE_NAME
from shearing.pruning.sparse.stored.trained import masks_beside
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.choices import CUT
from shearing.runs.stages.evaluation.rows import Row, is_shared_out, rows_of
from shearing.runs.stages.evaluation.tasks import measure_tasks
from shearing.runs.stages.evaluation.writing import measure_writing, prompts_in_words

PARTIAL_NAME = "evaluation.partial.json"
SPEED_REPETITIONS = 3


@named(COMPONENT_NAMES)
def evaluate(context: RunContext) -> dict[str, Any]:
    """Measure what exists of a run, write evaluation.json and print the comparison table.

    All processes call this. Held-out text and tasks are shared out, each model is measured by all of them together;
    what a model writes and how fast it is, the main one finds out, if it can hold it.

    Args:
        context: of a run that may have any number of its stages behind it.

    Returns:
        The content of evaluation.json: `settings`, `environment`, and `models` by name, each with `label`, `group`,
        `shape`, `parameters`, `parameters_without_embeddings`, `units` (a hash of those that it kept; null: all),
        `training_tokens`, `flops`, `domains` (loss, perplexity, bits_per_byte, tokens), `mean` and `speed`; of what
        mask learning made, `started_by` and `changed_from_start`; with `evaluation.outside` also `outside` and
        `outside_mean`, for the domains of that corpus; where one of them is sparse, `nonzero`: parameters that are not
        0; of the source and the run's own models `generation` and, with `evaluation.tasks`, `tasks`. `prompts` are
        those whose continuations are shown. Figures that are not finite are null.

    Raises:
        ShearingError: the corpus or the source model cannot be used; see `measure_tasks`.
    """
    processes = context.processes
    rows = processes.each(lambda: rows_of(context))
    results = _measure_losses(context, rows)
    measure_writing(context, rows, results=results)
    if context.recipe.evaluation.tasks:
        measure_tasks(context, rows, results=results)
    too_large = is_shared_out(context, rows[0])
    return processes.on_main(lambda: _finish(context, rows, results=results, too_large=too_large))


def _measure_losses(context: RunContext, rows: list[Row]) -> dict[str, dict[str, Any]]:
    """Held-out losses and sizes, by the names of rows; each kept in the run's folder as soon as it is measured."""
    recipe, run, console = context.recipe, context.directory, context.console
    sparse = context.processes.on_main(lambda: _is_any_sparse(context))
    earlier = context.processes.on_main(lambda: _earlier_results(run, settings=_settings(context)))
    results = {
        row.name: {**earlier[row.name], **_facts(row)}
        for row in rows
        if row.name in earlier and earlier[row.name]["fingerprint"] == row.fingerprint
    }
    missing = [row for row in rows if row.name not in results]
    # Time goes with tokens times parameters: a bar in tokens alone would promise the source's pace for all.
    corpora = [context.corpus] if context.outside is None else [context.corpus, context.outside]
    tokens_per_model = sum(
        corpus.heldout_tokens(
            split="test",
            sequence_length=recipe.data.sequence_length,
            tokens_per_domain=recipe.evaluation.tokens_per_domain,
        )
        for corpus in corpora
    )
    work = sum(row.shape.num_parameters() * tokens_per_model for row in missing)
    with activity(f"held-out losses of {len(missing)} models", total=work, console=console) as advance:
        for row in missing:
            started = time.perf_counter()
            model = row.load()
            losses = [
                heldout_loss(
                    model,
                    corpus,
                    split="test",
                    tokens_per_domain=recipe.evaluation.tokens_per_domain,
                    sequence_length=recipe.data.sequence_length,
                    micro_batch_size=recipe.evaluation.micro_batch_size,
                    precision=context.precision,
                    tokenizer=context.tokenizer,
                    progress=_scaled(advance, row.shape.num_parameters()),
                    chunk_tokens=recipe.training.loss_chunk_tokens,
                    rules=context.document_rules,
                    processes=context.processes,
                )
                for corpus in corpora
            ]
            results[row.name] = {**_result(row, *losses), "seconds": round(time.perf_counter() - started, 3)}
            if sparse:
                results[row.name]["nonzero"] = sum(
                    int(each.count_nonzero()) for each in weights_by_name(model).values()
                )
            if context.processes.is_main:
                write_json(run.path / PARTIAL_NAME, _content(context, rows, results=results))
            mean = results[row.name]["mean"]["loss"]
            console.print(f"{row.label}: mean held-out loss {'not finite' if mean is None else f'{mean:.3f}'}")
    return results


def _is_any_sparse(context: RunContext) -> bool:
    model, run = context.recipe.model, context.directory
    source = folder_of(model.source, revision=model.revision, also=[EARLIER_NAME, FILE_NAME])
    return any(masks_beside(folder) for folder in (source, run.sparse, run.model))


def _finish(
    context: RunContext, rows: list[Row], *, results: dict[str, dict[str, Any]], too_large: bool
) -> dict[str, Any]:
    """Measure speeds, unless the source is too large for a device, write evaluation.json and print the table."""
    run = context.directory
    shutil.rmtree(run.path / CUT, ignore_errors=True)
    if context.recipe.evaluation.speed and too_large:
        context.console.print("speed is not measured: it is that of one device, which cannot hold the source")
    elif context.recipe.evaluation.speed:
        _measure_speeds(context, rows=rows, results=results)
    evaluation = _content(context, rows, results=results)
    if context.recipe.evaluation.generation.prompts:
        evaluation["prompts"] = prompts_in_words(context)
    write_json(run.evaluation, evaluation)
    (run.path / PARTIAL_NAME).unlink(missing_ok=True)
    print_comparison(evaluation, console=context.console)
    return evaluation


def _content(context: RunContext, rows: list[Row], *, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    ordered = {row.name: results[row.name] for row in rows if row.name in results}
    return {"settings": _settings(context), "environment": environment(context.device), "models": ordered}


def print_comparison(evaluation: dict[str, Any], *, console: Console) -> None:
    """Print the comparison table and the sentence that sums it up.

    Args:
        evaluation: the content of evaluation.json.
        console: where to; 80 columns are enough for any number of models.
    """
    console.print(comparison_table(evaluation).rich())
    console.print(verdict(evaluation), style="bold")


def _measure_speeds(context: RunContext, *, rows: list[Row], results: dict[str, dict[str, Any]]) -> None:
    """Measure the source and the run's result in turns, unless that pair has been measured before."""
    latest = next((name for name in ("final", "sparse", "compact") if name in results), "source")
    pair = [row for row in rows if row.name in ("source", latest)]
    if all(results[row.name]["speed"] for row in pair):
        return
    models = {}
    for row in pair:
        models[row.name] = row.load_whole()
        models[row.name].to(context.precision)  # type: ignore[arg-type]
    with activity("speed", total=(SPEED_REPETITIONS + 1) * len(pair), console=context.console) as advance:
        speeds = measure_speed(
            models,
            prompt_tokens=min(context.recipe.data.sequence_length, 512),
            repetitions=SPEED_REPETITIONS,
            progress=lambda: advance(1),
        )
    for name, result in results.items():
        result["speed"] = dataclasses.asdict(speeds[name]) if name in speeds else None


def _settings(context: RunContext) -> dict[str, Any]:
    recipe, corpus = context.recipe, context.corpus
    return {
        "tokens_per_domain": recipe.evaluation.tokens_per_domain,
        "sequence_length": recipe.data.sequence_length,
        "micro_batch_size": recipe.evaluation.micro_batch_size,
        "precision": str(context.precision).removeprefix("torch."),
        "attention": recipe.data.attention,
        "loss_across_documents": recipe.data.loss_across_documents,
        "domains": list(corpus.domains),
        "corpus": corpus.fingerprint,
        "split": corpus.named_split("test"),
        "outside": None
        if context.outside is None
        else {"corpus": context.outside.fingerprint, "split": context.outside.named_split("test")},
    }


def _earlier_results(run: RunDirectory, *, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results by row name of an interrupted or finished evaluation with the same settings."""
    for path in (run.path / PARTIAL_NAME, run.evaluation):
        if path.is_file():
            earlier = read_json(path)
            if earlier.get("settings") == settings:
                # What is judged otherwise has settings of its own, and is kept apart.
                apart = ("generation", "tasks")
                return {
                    name: {key: value for key, value in model.items() if key not in apart}
                    for name, model in earlier["models"].items()
                }
    return {}


def _facts(row: Row) -> dict[str, Any]:
    """What is known of a row without its model."""
    facts: dict[str, Any] = {"label": row.label, "group": row.group, "training_tokens": row.training_tokens}
    facts["flops"] = row.flops
    if row.learned is not None and row.learned.tokens:
        facts |= {"started_by": row.learned.started_by, "changed_from_start": dict(row.learned.changed)}
    return facts


def _result(row: Row, losses: dict[str, DomainLoss], outside: dict[str, DomainLoss] | None = None) -> dict[str, Any]:
    content = {
        **_facts(row),
        "shape": row.shape.facts(),
        "parameters": row.shape.num_parameters(),
        "parameters_without_embeddings": row.shape.num_parameters(embeddings=False),
        "units": row.units(),
        "domains": {domain: loss.to_json() for domain, loss in losses.items()},
        "mean": macro_mean(losses).to_json(),
        "speed": None,
        "fingerprint": row.fingerprint,
    }
    if outside is not None:
        content["outside"] = {domain: loss.to_json() for domain, loss in outside.items()}
        content["outside_mean"] = macro_mean(outside).to_json()
    return content


def _scaled(advance: Callable[[int], None], factor: int) -> Callable[[int], None]:
    return lambda tokens: advance(tokens * factor)
