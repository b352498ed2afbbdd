"""Evaluation of every model of a run: the source, baselines of the same shape, the cut, sparse and final models.

Each row is written as soon as it is measured and is kept as long as its settings and its model stay the same, so an
interrupted evaluation continues and one after more training only measures what is new.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shearing.errors import named
from shearing.evaluation.environment import environment
from shearing.evaluation.heldout import DomainLoss, heldout_loss, macro_mean
from shearing.evaluation.speed import measure_speed
from shearing.evaluation.table import comparison_table, verdict
from shearing.files.durable import read_json, write_json
from shearing.models.cutting import Selection
from shearing.models.masked import Masks
from shearing.models.shape import Shape
from shearing.progress import activity
from shearing.pruning.sparse.stored.manifest import read_manifest
from shearing.pruning.sparse.stored.trained import masks_beside
from shearing.runs.context import RunContext
from shearing.runs.names import COMPONENT_NAMES
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.choices import Learned, Source, choosing_flops, made_from, training_flops
from shearing.runs.stages.recipe import Baseline
from shearing.training.recipe import StageRecipe

PARTIAL_NAME = "evaluation.partial.json"
SPEED_REPETITIONS = 3


@dataclass(frozen=True)
class _Row:
    """A model to measure.

    Attributes:
        group: of those of the same shape, at the same place of a run.
        flops: of choosing its units, the refit and its training.
        units: hash of the units that it kept, asked for once it is loaded; None: all.
        learned: what mask learning made of its start.
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


@named(COMPONENT_NAMES)
def evaluate(context: RunContext) -> dict[str, Any]:
    """Measure what exists of a run, write evaluation.json and print the comparison table.

    Args:
        context: of a run that may have any number of its stages behind it.

    Returns:
        The content of evaluation.json: `settings`, `environment`, and `models` by name, each with `label`, `group`,
        `shape`, `parameters`, `parameters_without_embeddings`, `units` (a hash of those that it kept; null: all),
        `training_tokens`, `flops`, `domains` (loss, perplexity, bits_per_byte, tokens), `mean` and `speed`; of what
        mask learning made, `started_by` and `changed_from_start`; with `evaluation.outside` also `outside` and
        `outside_mean`, for the domains of that corpus; where one of them is sparse, `nonzero`: parameters that are not
        0. Figures that are not finite are null.

    Raises:
        ShearingError: the corpus or the source model cannot be used.
    """
    recipe, run, console = context.recipe, context.directory, context.console
    settings = _settings(context)
    rows = _rows(context)
    sparse = any(masks_beside(folder) for folder in (Path(recipe.model.source), run.sparse, run.model))
    earlier = _earlier_results(run, settings=settings)
    results = {
        row.name: {**earlier[row.name], **_facts(row)}
        for row in rows
        if row.name in earlier and earlier[row.name]["fingerprint"] == row.fingerprint
    }
    missing = [row for row in rows if row.name not in results]
    partial = run.path / PARTIAL_NAME

    def content() -> dict[str, Any]:
        ordered = {row.name: results[row.name] for row in rows if row.name in results}
        return {"settings": settings, "environment": environment(context.device), "models": ordered}

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
                )
                for corpus in corpora
            ]
            results[row.name] = {**_result(row, *losses), "seconds": round(time.perf_counter() - started, 3)}
            if sparse:
                results[row.name]["nonzero"] = sum(int(each.count_nonzero()) for each in model.parameters())
            write_json(partial, content())
            mean = results[row.name]["mean"]["loss"]
            console.print(f"{row.label}: mean held-out loss {'not finite' if mean is None else f'{mean:.3f}'}")
    if recipe.evaluation.speed:
        _measure_speeds(context, rows=rows, results=results)
    evaluation = content()
    write_json(run.evaluation, evaluation)
    partial.unlink(missing_ok=True)
    print_comparison(evaluation, console=console)
    return evaluation


def print_comparison(evaluation: dict[str, Any], *, console: Console) -> None:
    """Print the comparison table and the sentence that sums it up.

    Args:
        evaluation: the content of evaluation.json.
        console: where to; 100 columns are enough for the models of a run.
    """
    console.print(comparison_table(evaluation).rich())
    console.print(verdict(evaluation), style="bold")


def _rows(context: RunContext) -> list[_Row]:
    """The models that exist, in the order of the table."""
    recipe, run, source = context.recipe, context.directory, Source(context)
    source_fingerprint = _fingerprint(Path(recipe.model.source), recipe.model.revision)
    whole = Shape.of(context.config)
    rows = [_Row("source", "source", "source", whole, 0, 0.0, source_fingerprint, source.model)]
    learned: Learned | None = None
    units: Callable[[], str | None] = lambda: None  # noqa: E731

    def of_run(name: str, label: str, group: str, folder: Path, training_tokens: int) -> _Row:
        def load() -> PreTrainedModel:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation=recipe.model.attn_implementation
            )
            model.to(context.device)  # type: ignore[arg-type]
            return model

        shape = Shape.of(AutoConfig.from_pretrained(folder))
        mark = _fingerprint(folder, None)
        return _Row(name, label, group, shape, training_tokens, flops, mark, load, units, learned)

    tokens, flops, made_by = 0, 0.0, []
    shape, length = whole, recipe.data.sequence_length
    if recipe.prune is not None and run.is_complete("compact"):
        tokens += _tokens_of(recipe.prune, recipe)
        shape = Shape.of(AutoConfig.from_pretrained(run.compact))
        summary = run.prune / "summary.json"
        learned = Learned.of(context, summary=read_json(summary) if summary.is_file() else {})
        units = functools.partial(_units_of_run, run, source=whole, shape=shape)
        flops += choosing_flops(context, metric=recipe.prune.graded_by, refitted=learned.refitted, target=shape)
        flops += training_flops(whole, teacher=context.teacher_shape, tokens=tokens, sequence_length=length)
        made_by.append(learned.title)
        rows += [
            _baseline(context, name, baseline, source=source, source_fingerprint=source_fingerprint, target=shape)
            for name, baseline in recipe.evaluation.by_name().items()
        ]
        rows.append(of_run("compact", learned.title, "cut", run.compact, tokens))
    if recipe.sparsify is not None and run.is_complete("sparsify"):
        manifest = read_manifest(run.sparse)
        made_by.append(f"{manifest['criterion']} {manifest['pattern']}")
        rows.append(of_run("sparse", ", ".join(made_by), "sparse", run.sparse, tokens))
    if run.is_complete("pretrain"):
        trained = _tokens_of(recipe.pretrain, recipe)
        tokens += trained
        flops += training_flops(shape, teacher=context.teacher_shape, tokens=trained, sequence_length=length)
        rows.append(of_run("final", ", ".join([*made_by, "pretrained"]), "pretrained", run.model, tokens))
    return rows


def _baseline(
    context: RunContext, name: str, baseline: Baseline, *, source: Source, source_fingerprint: str, target: Shape
) -> _Row:
    wanted = made_from(context, metric=baseline.metric, target=target)
    fingerprint = f"{source_fingerprint} {name} {json.dumps(wanted, sort_keys=True)}"
    flops = choosing_flops(context, metric=baseline.metric, refitted=baseline.refitted, target=target)
    load = functools.partial(source.cut, baseline, target=target)
    units = functools.partial(source.digest, baseline, target=target)
    return _Row(name, baseline.title, "cut", target, 0, flops, fingerprint, load, units)


def _units_of_run(run: RunDirectory, *, source: Shape, shape: Shape) -> str | None:
    """Hash of the units that the final masks keep; None where the masks are gone."""
    path = run.prune / "masks.safetensors"
    if not path.is_file():
        return None
    return Selection.of(Masks(**load_file(path)), source=source, target=shape).digest


def _measure_speeds(context: RunContext, *, rows: list[_Row], results: dict[str, dict[str, Any]]) -> None:
    """Measure the source and the run's result in turns, unless that pair has been measured before."""
    latest = next((name for name in ("final", "sparse", "compact") if name in results), "source")
    pair = [row for row in rows if row.name in ("source", latest)]
    if all(results[row.name]["speed"] for row in pair):
        return
    models = {row.name: row.load() for row in pair}
    for model in models.values():
        model.to(context.precision)  # type: ignore[arg-type]
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
                return dict(earlier["models"])
    return {}


def _facts(row: _Row) -> dict[str, Any]:
    """What is known of a row without its model."""
    facts: dict[str, Any] = {"label": row.label, "group": row.group, "training_tokens": row.training_tokens}
    facts["flops"] = row.flops
    if row.learned is not None and row.learned.tokens:
        facts |= {"started_by": row.learned.started_by, "changed_from_start": dict(row.learned.changed)}
    return facts


def _result(row: _Row, losses: dict[str, DomainLoss], outside: dict[str, DomainLoss] | None = None) -> dict[str, Any]:
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


def _fingerprint(source: Path, revision: str | None) -> str:
    """Tells a model from another in the same place: sizes and times of its weight files, or hub name and revision."""
    if not source.is_dir():
        return f"{source}@{revision}"
    files = [
        f"{path.name}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in sorted(source.glob("*.safetensors"))
    ]
    return " ".join([str(source), *files])


def _tokens_of(stage: StageRecipe, recipe: Recipe) -> int:
    length = recipe.data.sequence_length
    return stage.total_steps(sequence_length=length) * stage.tokens_per_step(sequence_length=length)


def _scaled(advance: Callable[[int], None], factor: int) -> Callable[[int], None]:
    return lambda tokens: advance(tokens * factor)
