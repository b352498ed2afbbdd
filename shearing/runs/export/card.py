"""The model card of an export: what is known of how the model was made, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from shearing.errors import ShearingError
from shearing.evaluation.table import comparison_table
from shearing.files.durable import read_json
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.continuation.cascade import as_one, runs_before
from shearing.runs.continuation.changes import changes_of
from shearing.runs.export.origin import Origin
from shearing.runs.export.vocabulary import CutVocabulary
from shearing.runs.planning.summary import shape_cells
from shearing.runs.recipe import Recipe
from shearing.runs.stages.choices import Learned
from shearing.settings.quantities import format_parameters, format_tokens
from shearing.training.recipe import PretrainRecipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CARD = "README.md"
OF_SOURCE = "README.source.md"
"""The source's own card, which is of another model."""

_LICENCE = ("license", "license_name", "license_link", "language")
_PLACES = ("run_dir", "corpus", "outside")
"""Keys that say where something is on the machine that trained, and nothing else."""


def write_card(
    folder: Path,
    *,
    origin: Origin,
    shape: Shape,
    dtype: str,
    versions: Mapping[str, Any],
    vocabulary: CutVocabulary | None = None,
) -> None:
    """Write README.md into an export of a run; the source's own stays beside it under another name.

    Args:
        folder: of the export, with the source's files.
        origin: of a run.
        shape: the model's.
        dtype: its weights', in the words of settings.
        versions: of what trained and wrote it.
        vocabulary: what stayed of it; None: all.
    """
    assert origin.context is not None
    recipe = origin.context.recipe
    runs = [*(RunContext(each, console=Console(quiet=True)) for each in runs_before(recipe)), origin.context]
    of_source = folder / CARD
    head = _head(of_source.read_text(encoding="utf-8")) if of_source.is_file() else {}
    licences = sorted(path.name for path in folder.iterdir() if path.name.upper().startswith(("LICEN", "NOTICE")))
    if of_source.is_file():
        of_source.rename(folder / OF_SOURCE)
    parts = [
        _front(head, runs=runs, sparse=origin.start.masks is not None),
        f"# {recipe.name}",
        *_what(origin, runs=runs, shape=shape, dtype=dtype),
        *_method(origin, runs=runs, vocabulary=vocabulary),
        *_data(origin, runs=runs),
        *_measured(origin, vocabulary=vocabulary),
        *_again(as_one([each.recipe for each in runs]), versions=versions),
        *_licence(head, files=licences),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _head(card: str) -> dict[str, Any]:
    """What the front matter of a source's card says of its licence and languages."""
    start, _, rest = card.partition("---\n")
    try:
        said = yaml.safe_load(rest.partition("\n---")[0]) if not start.strip() else None
    except yaml.YAMLError:
        said = None
    return {name: said[name] for name in _LICENCE if name in said} if isinstance(said, dict) else {}


def _front(head: Mapping[str, Any], *, runs: Sequence[RunContext], sparse: bool) -> str:
    source = runs[0].recipe.model.source
    said: dict[str, Any] = {**head, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if not Path(source).exists():
        said["base_model"] = source
    said["tags"] = ["pruned"] * any(each.recipe.prune is not None for each in runs) + ["sparse"] * sparse
    return f"---\n{yaml.safe_dump(said, sort_keys=False)}---"


def _what(origin: Origin, *, runs: Sequence[RunContext], shape: Shape, dtype: str) -> Iterator[str]:
    source = _without_places(runs[0].recipe.model.source)
    at = "" if origin.step is None else f" It is the state after step {origin.step:,} of {_total(runs[-1]):,}."
    yield f"{format_parameters(shape.num_parameters())} parameters in {dtype}, made of `{source}` with shearing.{at}"
    yield "## Shape"
    rows = ["| model | parameters | without embeddings | shape |", "|---|---:|---:|---|"]
    configs = [_config(each) for each in runs]
    for name, config in zip(["source", *_names(runs)], configs, strict=True):
        gone = ["", "", "its files are no longer where they were"]
        rows.append(f"| {name} | {' | '.join(gone if config is None else shape_cells(Shape.of(config)))} |")
    of_source = shape.family.model_type if configs[0] is None else configs[0].model_type
    yield "\n".join([*rows, f"| this model | {' | '.join(shape_cells(shape))} |"])
    if shape.family.model_type != of_source:
        yield (
            f"Stored as `{shape.family.model_type}`, which computes the same: transformers' config of `{of_source}` "
            "refuses these sizes."
        )


def _config(run: RunContext) -> PretrainedConfig | None:
    """Of its source; None: that is not there any more."""
    try:
        return run.config
    except ShearingError:
        return None


def _names(runs: Sequence[RunContext]) -> list[str]:
    """What a cascade calls the models on the way, of its runs in order."""
    return [each.directory.path.name for each in runs[:-1]]


def _method(origin: Origin, *, runs: Sequence[RunContext], vocabulary: CutVocabulary | None) -> Iterator[str]:
    assert origin.context is not None
    yield "## Method"
    if before := runs[:-1]:
        yield f"A cascade: by way of {', '.join(_names(runs))}, each cut from the one before and trained."
    for name, run in zip(_names(runs), before, strict=True):
        yield "\n".join([f"Of {name}:", "", *_done(run, step=_total(run))])
    own = _done(origin.context, step=origin.step)
    if before:
        tokens = sum(_tokens(each, step=_total(each)) for each in before)
        tokens += 0 if origin.step is None else _tokens(origin.context, step=origin.step)
        own = ["Of this model:", "", *own, f"- Continued pretraining of all together: {format_tokens(tokens)} tokens."]
    distill = origin.context.recipe.distill
    if distill is not None:
        own.append(f"- Training listened to a teacher: {_without_places(distill.teacher)}.")
    if vocabulary is not None:
        own.append(f"- Vocabulary: {vocabulary}.")
    yield "\n".join(own) or "No units were cut, no weights zeroed, and nothing was trained."


def _done(context: RunContext, *, step: int | None) -> list[str]:
    """What a run has done, up to a step of continued pretraining, a line each."""
    recipe, run = context.recipe, context.directory
    lines = []
    if recipe.prune is not None:
        summary = run.prune / "summary.json"
        learned = Learned.of(context, summary=read_json(summary) if summary.is_file() else {})
        lines.append(f"- Units: {learned.title}; cut to one size for all layers.")
    if recipe.sparsify is not None:
        asked = recipe.sparsify.model_dump(mode="json", include={"criterion", "pattern", "sparsity"}, exclude_none=True)
        lines.append(f"- Zeros: {', '.join(f'{name} {value}' for name, value in asked.items())}; kept while training.")
    if step is not None:
        stage, tokens = recipe.pretrain, _tokens(context, step=step)
        lines.append(
            f"- Continued pretraining: {format_tokens(tokens)} tokens in {step:,} steps, learning rate "
            f"{stage.learning_rate:g}, schedule {stage.schedule}"
            f"{_way(stage)}."
        )
        for change in changes_of(run):
            keys = ", ".join(f"{key} from {before} to {after}" for key, (before, after) in change.keys.items())
            lines.append(f"- Changed after step {change.step:,} of it: {keys}.")
    return lines


def _way(stage: PretrainRecipe) -> str:
    """What was trained where it was not all weights under masks that stay."""
    ways = {
        ", low-rank adapters merged": stage.lora,
        ", factors of weights merged (SPP)": stage.spp,
        ", changes of salient weights merged (SPEFT)": stage.speft,
        ", masks chosen anew on the way (AST)": stage.ast,
    }
    return next((words for words, section in ways.items() if section is not None), "")


def _data(origin: Origin, *, runs: Sequence[RunContext]) -> Iterator[str]:
    recipe = runs[-1].recipe
    yield "## Data"
    if origin.step != _total(runs[-1]) or not all(each.directory.is_complete("pretrain") for each in runs):
        domains = ", ".join(recipe.data.domains or ())
        yield f"Sequences of {recipe.data.sequence_length:,} tokens{f' of {domains}' if domains else ''}."
        return
    tokens = Counter[str]()
    for each in runs:
        length, drawn = each.recipe.data.sequence_length, each.directory.read_complete("pretrain")["samples"]
        tokens.update({name: count * length for name, count in drawn.items()})
    rows = ["| domain | tokens of continued pretraining |", "|---|---:|"]
    rows += [f"| {name} | {count:,} |" for name, count in tokens.items()]
    yield "\n".join(rows)


def _measured(origin: Origin, *, vocabulary: CutVocabulary | None) -> Iterator[str]:
    assert origin.context is not None
    run = origin.context.directory
    yield "## Measured"
    last = origin.step == _total(origin.context) and run.is_complete("evaluate")
    evaluation = read_json(run.evaluation) if last else {"models": {}}
    if "final" in evaluation["models"]:
        column = f"`{evaluation['models']['final']['label']}`, as its run wrote it"
        if vocabulary is None:
            yield f"The column of this model is {column}."
        else:
            yield (
                f"All of this was measured before the vocabulary was cut from {vocabulary.of:,} tokens to "
                f"{vocabulary.rows:,}; the column of the whole model is {column}. The loss of this model is lower, as "
                "it shares out its probability among fewer tokens, and cannot be compared with these."
            )
        yield comparison_table(evaluation).markdown().strip()
    else:
        yield "This state was not measured."


def _again(recipe: Recipe, *, versions: Mapping[str, Any]) -> Iterator[str]:
    given = recipe.model_dump(mode="json", exclude_defaults=True)
    yield "## Made by"
    yield "`shear run recipe.yaml`, with places of this machine left out:"
    yield f"```yaml\n{yaml.safe_dump(_without_places(given), sort_keys=False)}```"
    yield ", ".join(f"{name} {value}" for name, value in versions.items() if value is not None) + "."


def _without_places(given: Any) -> Any:
    """Of settings, those that mean something elsewhere; of files and folders, their names."""
    if isinstance(given, dict):
        return {name: _without_places(value) for name, value in given.items() if name not in _PLACES}
    if isinstance(given, list):
        return [_without_places(value) for value in given]
    if isinstance(given, str) and (Path(given).is_absolute() or Path(given).exists()):
        return Path(given).name
    return given


def _licence(head: Mapping[str, Any], *, files: list[str]) -> Iterator[str]:
    yield "## Licence"
    said = f"The source's card says {json.dumps(head['license'])}. " if "license" in head else ""
    yield said + (
        f"The source's own terms are in {', '.join(files)}."
        if files
        else "No file beside the source has its terms; they hold for this model as well."
    )


def _total(context: RunContext) -> int:
    recipe = context.recipe
    return recipe.pretrain.total_steps(sequence_length=recipe.data.sequence_length)


def _tokens(context: RunContext, *, step: int) -> int:
    """Of continued pretraining of a run up to a step."""
    recipe = context.recipe
    return step * recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
