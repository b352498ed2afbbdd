"""Gathers what a run has written and fills the page: template `page.html.j2`, no external resources."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from markupsafe import Markup
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shearing.errors import ShearingError
from shearing.evaluation.table import ComparisonTable, comparison_table
from shearing.evaluation.verdict import verdict
from shearing.files.durable import read_json, write_text
from shearing.pruning.sparse.stored.manifest import MANIFEST
from shearing.pruning.structured.granularities import SIZE_OF
from shearing.pruning.structured.masking.facts import MASKINGS
from shearing.runs.continuation.changes import Change, changes_of
from shearing.runs.report.charts import SMALL, line_chart
from shearing.runs.report.judged import judged
from shearing.runs.report.series import (
    SERIES_COLOURS,
    Colour,
    Series,
    StageMetrics,
    downsample,
    keys_of,
    nested,
    read_stages,
    series_of,
    smooth,
)
from shearing.runs.report.unit_map import UnitMap, unit_map
from shearing.runs.run_directory import RunDirectory
from shearing.settings.quantities import format_parameters, format_tokens

_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "num_attention_heads": "query heads",
    "num_key_value_heads": "KV heads",
    "intermediate_size": "intermediate size",
}

_ORIGINS = {
    "Held-out loss": "Measured on fixed held-out rows at every update of the mixture.",
    "Mean training loss": "Moving average over training steps, read at every update of the mixture.",
    "Validation loss": "Measured on fixed rows of validation text; nothing follows it.",
}


@dataclass(frozen=True)
class Panel:
    """A small chart with its heading and, after it, a figure in words."""

    heading: str
    figure: str
    svg: Markup
    colour: Colour = "ink"


@dataclass(frozen=True)
class Tile:
    """One size before and after."""

    label: str
    before: str
    after: str
    share: float


def write_report(run_dir: Path | str) -> Path:
    """Write report.html of a run: one file without external resources.

    Args:
        run_dir: folder of a run; any of its files may be absent, the page says so.

    Returns:
        Path of the page.

    Raises:
        ShearingError: a JSON file of the run is damaged, or the folder cannot be written.
    """
    run = RunDirectory(run_dir)
    run.require_writable()
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shearing.runs.report", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    write_text(run.report, environment.get_template("page.html.j2").render(**_content(run)))
    return run.report


def _content(run: RunDirectory) -> dict[str, Any]:
    """Everything the template names."""
    evaluation = _read(run.evaluation)
    recipe = run.recipe.read_text(encoding="utf-8") if run.recipe.is_file() else None
    summary, cut = _read(run.prune / "summary.json"), _read(run.compact / "shape.json")
    stages = read_stages({name: run.metrics(stage) for name, stage in _training_stages(recipe).items()})
    marks, kind, at_once = _stage_marks(stages), _kind_of_losses(stages), summary.get("steps") == 0
    domains = list(dict.fromkeys(keys_of(stages, "weights") + keys_of(stages, "losses", updates=True)))
    domains = list(dict.fromkeys([*domains, *keys_of(stages, "validation", updates=True)]))
    table: ComparisonTable | None = comparison_table(evaluation) if evaluation.get("models") else None
    return {
        "name": _name(recipe) or run.path.absolute().name,
        "folder": str(run.path),
        "verdict": verdict(evaluation) if table else None,
        "tiles": _tiles(evaluation) if table else [],
        "table": table,
        "judged": judged(evaluation),
        "environment": _environment(evaluation),
        "progress": _progress(stages, at_once=at_once),
        "changes": [
            (f"after step {each.step:,} of continued pretraining", _in_words(each)) for each in changes_of(run)
        ],
        "loss": _noisy_chart(stages, name="loss", title="Training loss over tokens", marks=marks),
        "domains": [(domain, _colour(index)) for index, domain in enumerate(domains)],
        "losses_kind": kind,
        "losses_origin": _ORIGINS[kind],
        "heldout": _heldout_panels(stages, domains=domains, marks=marks, kind=kind),
        "weights": _weights_chart(stages, domains=domains, marks=marks),
        "sizes": _size_panels(stages[:1]),
        "violations": _violation_panels(stages[:1]),
        "multipliers": _multiplier_panels(stages[:1]),
        "learns_masks": len(stages) > 1,
        "at_once": at_once,
        "pruning": stages[0].name,
        "map": _map(run),
        "zeros": _zeros(run),
        "summary": _summary_table(summary, cut),
        "throughput": _noisy_chart(
            stages, name="tokens_per_second", title="Training tokens per second", marks=marks, zero=True
        ),
        "data_wait": _data_wait(stages),
        "gradient": _noisy_chart(stages, name="grad_norm", title="Gradient norm", marks=marks, zero=True),
        "recipe": recipe,
    }


def _tiles(evaluation: Mapping[str, Any]) -> list[Tile]:
    models = evaluation["models"]
    source, result = models.get("source"), next(filter(None, map(models.get, ("final", "sparse", "compact"))), None)
    if source is None or result is None:
        return []
    tiles = [
        Tile(
            "parameters",
            format_parameters(source["parameters"]),
            format_parameters(result["parameters"]),
            result["parameters"] / source["parameters"],
        )
    ]
    if "nonzero" in source and "nonzero" in result:
        before, after = source["nonzero"], result["nonzero"]
        tiles.append(Tile("not zero", format_parameters(before), format_parameters(after), after / before))
    for name, label in _SIZES.items():
        before, after = source["shape"].get(name), result["shape"].get(name)
        if before and after:
            tiles.append(Tile(label, str(before), str(after), after / before))
    return tiles


def _environment(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in evaluation.get("environment", {}).items() if value is not None]


def _name(recipe: str | None) -> str | None:
    """`name` of the recipe, which is there for this page; None for a file that somebody has damaged."""
    name = _parsed(recipe).get("name")
    return str(name) if name else None


def _parsed(recipe: str | None) -> dict[str, Any]:
    """The recipe as plain data; empty for a file that is not there or that somebody has damaged."""
    try:
        content = yaml.safe_load(recipe or "")
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _training_stages(recipe: str | None) -> dict[str, Literal["prune", "pretrain"]]:
    """Name and stage of what trains; a recipe that cannot be read is taken for one that learns masks and trains on."""
    pretraining: dict[str, Literal["prune", "pretrain"]] = {"continued pretraining": "pretrain"}
    prune = _parsed(recipe).get("prune", {})
    if prune is None:
        return pretraining
    masks = str(prune.get("masks")) if isinstance(prune, dict) else "learned"
    other = MASKINGS.get(masks) if masks != "learned" else None
    return {"mask learning" if other is None else other.title: "prune", **pretraining}


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _progress(stages: Sequence[StageMetrics], *, at_once: bool) -> list[tuple[str, str]]:
    """Name of each stage and how far it has come, in words; `at_once`: the first had no steps to come."""
    lines = []
    start = 0.0
    for stage in stages:
        if not stage.steps:
            lines.append((stage.name, "no steps: cut at once" if at_once and stage is stages[0] else "no steps yet"))
            continue
        last = stage.steps[-1]
        text = f"{last.get('step', len(stage.steps)):,} steps, {format_tokens(stage.last_tokens - start)} tokens"
        if isinstance(last.get("loss"), int | float):
            text += f", last loss {last['loss']:.3f}"
        skipped = last.get("skipped") or 0
        lines.append((stage.name, text + (f", {skipped} steps skipped" if skipped else "")))
        start = stage.last_tokens
    return lines


def _in_words(change: Change) -> str:
    return ", ".join(f"{key} from {before} to {after}" for key, (before, after) in change.keys.items())


def _stage_marks(stages: Sequence[StageMetrics]) -> list[tuple[float, str]]:
    """Where the model was cut, once training went on after it."""
    return [(stages[0].last_tokens, "cut")] if len(stages) > 1 and all(stage.steps for stage in stages) else []


def _noisy_chart(
    stages: Sequence[StageMetrics], *, name: str, title: str, marks: Sequence[tuple[float, str]], zero: bool = False
) -> Markup | None:
    """Each step pale, the moving mean of each stage strong."""
    lines = []
    for stage in stages:
        x, y = series_of([stage], read=lambda line: line.get(name))
        if x:
            window = max(1, len(y) // 40)
            lines.append(Series("each step", *downsample(x, y), faint=True))
            lines.append(Series("mean", *downsample(x, smooth(y, window=window))))
    return line_chart(lines, title=title, marks=marks, zero=zero) if lines else None


def _heldout_panels(
    stages: Sequence[StageMetrics], *, domains: Sequence[str], marks: Sequence[tuple[float, str]], kind: str
) -> list[Panel]:
    panels = []
    for index, domain in enumerate(domains):
        followed, looked_at = (
            series_of(stages, read=nested(name, domain), updates=True) for name in ("losses", "validation")
        )
        if not followed[0] and not looked_at[0]:
            continue
        reference_x, reference_y = series_of(stages, read=nested("reference", domain), updates=True)
        lines = [Series(domain, *downsample(*followed), colour=_colour(index))] if followed[0] else []
        if looked_at[0]:
            colour = "muted" if followed[0] else _colour(index)
            lines.append(Series("validation", *downsample(*looked_at), colour=colour))
        figure = f"{(followed[1] or looked_at[1])[-1]:.2f}"
        if reference_x:
            lines.append(Series("reference", *downsample(reference_x, reference_y), colour="muted", dashed=True))
            figure += f" · reference {reference_y[-1]:.2f}"
        svg = line_chart(lines, title=f"{kind}, {domain}", size=SMALL, marks=[(x, "") for x, _ in marks])
        panels.append(Panel(domain, figure, svg, _colour(index)))
    return panels


def _kind_of_losses(stages: Sequence[StageMetrics]) -> str:
    """What the losses by domain are; a key of `_ORIGINS`."""
    updates = [update for stage in stages for update in stage.updates]
    if updates and all("validation" in update for update in updates):
        return "Validation loss"
    averaged = any(update.get("losses_from") == "training" for update in updates)
    return "Mean training loss" if averaged else "Held-out loss"


def _weights_chart(
    stages: Sequence[StageMetrics], *, domains: Sequence[str], marks: Sequence[tuple[float, str]]
) -> Markup | None:
    lines = []
    for index, domain in enumerate(domains):
        x, y = series_of(stages, read=nested("weights", domain))
        if x:
            x, y = downsample(x, y)
            lines.append(Series(domain, x, y, colour=_colour(index), steps=True, dashed=index >= len(SERIES_COLOURS)))
    return line_chart(lines, title="Domain weights over tokens", marks=marks, zero=True) if lines else None


def _granularities(stages: Sequence[StageMetrics], *names: str) -> list[str]:
    """Keys of the dictionaries called `names`, from layers to hidden dimensions, others last."""
    found = dict.fromkeys(key for name in names for key in keys_of(stages, name))
    return sorted(found, key=lambda key: list(SIZE_OF).index(key) if key in SIZE_OF else len(SIZE_OF))


def _size_panels(stages: Sequence[StageMetrics]) -> list[Panel]:
    panels = []
    for name in _granularities(stages, "expected"):
        x, expected = series_of(stages, read=nested("expected", name))
        target_x, target = series_of(stages, read=nested("target", name))
        if not x:
            continue
        lines = [Series("expected", *downsample(x, expected))]
        figure = _short(expected[-1])
        if target_x:
            lines.append(Series("target", *downsample(target_x, target), colour="ink", dashed=True))
            figure += f" · target {_short(target[-1])}"
        svg = line_chart(lines, title=f"Expected and target size, {_words(name)}", size=SMALL)
        panels.append(Panel(_words(name), figure, svg))
    return panels


def _violation_panels(stages: Sequence[StageMetrics]) -> list[Panel]:
    panels = []
    for name in _granularities(stages, "violation"):
        x, y = series_of(stages, read=nested("violation", name))
        if x:
            lines = [
                Series("zero", [x[0], x[-1]], [0.0, 0.0], colour="muted", dashed=True),
                Series("violation", *downsample(x, y), colour="s3"),
            ]
            svg = line_chart(lines, title=f"Violation of the constraint, {_words(name)}", size=SMALL)
            panels.append(Panel(_words(name), f"{y[-1]:.2%}", svg))
    return panels


def _multiplier_panels(stages: Sequence[StageMetrics]) -> list[Panel]:
    panels = []
    for name in _granularities(stages, "lambda_1", "lambda_2"):
        lines, figures = [], []
        for multiplier, symbol, colour in (
            ("lambda_1", "λ₁", SERIES_COLOURS[0]),
            ("lambda_2", "λ₂", SERIES_COLOURS[1]),
        ):
            x, y = series_of(stages, read=nested(multiplier, name))
            if x:
                lines.append(Series(symbol, *downsample(x, y), colour=colour))
                figures.append(f"{symbol} {y[-1]:.3g}")
        if lines:
            svg = line_chart(lines, title=f"Multipliers, {_words(name)}", size=SMALL)
            panels.append(Panel(_words(name), " · ".join(figures), svg))
    return panels


def _data_wait(stages: Sequence[StageMetrics]) -> str | None:
    """Share of the time of all steps that was spent waiting for data."""
    waits = [line["data_wait"] for stage in stages for line in stage.steps if _is_number(line.get("data_wait"))]
    seconds = [line["seconds"] for stage in stages for line in stage.steps if _is_number(line.get("seconds"))]
    if not waits or not seconds or not sum(seconds):
        return None
    return f"{sum(waits):.2f} s of {sum(seconds):,.0f} s spent waiting for data ({sum(waits) / sum(seconds):.2%})"


def _map(run: RunDirectory) -> UnitMap | None:
    path = run.prune / "masks.safetensors"
    if not path.is_file():
        return None
    try:
        masks: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise ShearingError(
            str(path),
            value=str(error),
            allowed="a safetensors file",
            mend=f"the file was damaged: remove {path.parent / 'complete.json'} and run `shear prune` again",
        ) from error
    return unit_map(masks)


def _zeros(run: RunDirectory) -> list[tuple[str, str]]:
    """What the manifest of the newest sparse model says; empty where there is none."""
    manifest = _read(run.model / MANIFEST) or _read(run.sparse / MANIFEST)
    if not manifest:
        return []
    reached, nonzero = manifest["budget"]["reached"], sum(each["nonzero"] for each in manifest["matrices"].values())
    trained = sum(each["tokens"] for each in manifest.get("trained", []))
    return [
        ("chosen by", f"{manifest['criterion']}, reconstruction {manifest['reconstruction']}"),
        ("pattern", f"{manifest['pattern']}: {manifest['pattern_in_words']}"),
        ("kept by the masks", f"{format_parameters(reached['kept'])} of {format_parameters(reached['of'])}"),
        ("not zero now", format_parameters(nonzero)),
        ("trained under the masks", f"{format_tokens(trained)} tokens"),
    ]


def _summary_table(summary: Mapping[str, Any], cut: Mapping[str, Any]) -> dict[str, Any] | None:
    """What prune/summary.json says of each granularity, and how exact the cut was."""
    names = list(summary.get("rounding_gap", {}))
    if not names:
        return None
    figures = {key: summary[key] for key in ("units", "target", "expected") if key in summary}
    # A run of a version that did not count has none of the first two.
    counts = [key for key in ("changed_from_start", "ever_in_doubt", "rounding_gap") if key in summary]
    totals = summary.get("total_units", {})
    rows = []
    for name in names:
        cells = [_short(values[name]) if name in values else "–" for values in figures.values()]
        of_all = f" of {totals[name]:,}" if name in totals else ""
        found = [summary[key][name] for key in counts]
        cells += [count if isinstance(count, str) else f"{count:,}{of_all}" for count in found]
        rows.append((_words(name), cells))
    facts = []
    if counts_of := summary.get("parameters"):
        facts.append(("parameters when masks stopped moving", f"{counts_of['learned']:,}"))
        facts.append(("parameters after rounding to the target", f"{counts_of['kept']:,}"))
    losses = [value for value in summary.get("heldout", {}).get("before_cutting", {}).values() if _is_number(value)]
    if losses:
        facts.append(("mean held-out loss under the final masks", f"{sum(losses) / len(losses):.3f}"))
    if _is_number(cut.get("relative_logit_difference")):
        facts.append(("relative difference of logits, masked and cut", f"{cut['relative_logit_difference']:.1e}"))
    return {"columns": [key.replace("_", " ") for key in (*figures, *counts)], "rows": rows, "facts": facts}


def _colour(index: int) -> Colour:
    return SERIES_COLOURS[index % len(SERIES_COLOURS)]


def _words(name: str) -> str:
    """A granularity as people say it; query heads are counted inside their group."""
    return {"kv_groups": "KV groups", "query_heads": "query heads of a group"}.get(name, name.replace("_", " "))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> str:
    if isinstance(value, int) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
