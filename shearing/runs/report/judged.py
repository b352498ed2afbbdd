"""What tasks and continuations said of the models: dots with intervals, figures, and samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes

from shearing.evaluation.tasks.figures import INTERVAL, is_share, written
from shearing.runs.report.charts import PAINTS, drawing
from shearing.runs.report.series import SERIES_COLOURS, Colour

_WIDTH, _HEIGHT_OF_TASK, _MARGIN = 9.4, 0.34, 0.55
"""Inches of the chart of tasks."""


@dataclass(frozen=True)
class Sample:
    """A prompt and what each model writes after it: (name of the model, greedily, drawn)."""

    domain: str
    prompt: str
    written: list[tuple[str, str, str]]


@dataclass(frozen=True)
class Judged:
    """The section of the report; parts are empty where nothing was measured.

    Attributes:
        models: names of the models that were asked tasks, with their colours.
        dots: their shares with 95 % intervals.
        figures: task, questions, examples, and what every model reached.
        writers: names of the models that wrote.
        writing: label, and a figure of every writer.
        samples: one of each domain.
    """

    models: list[tuple[str, Colour]]
    dots: Markup | None
    figures: list[tuple[str, list[str]]]
    writers: list[str]
    writing: list[tuple[str, list[str]]]
    samples: list[Sample]


def judged(evaluation: Mapping[str, Any]) -> Judged | None:
    """What evaluation.json says of tasks and writing; None where it says nothing of either."""
    models: Sequence[Mapping[str, Any]] = list(evaluation.get("models", {}).values())
    asked = [model for model in models if model.get("tasks")]
    writers = [model for model in models if model.get("generation")]
    if not asked and not writers:
        return None
    colours = [SERIES_COLOURS[index % len(SERIES_COLOURS)] for index in range(len(asked))]
    return Judged(
        models=[(model["label"], colour) for model, colour in zip(asked, colours, strict=True)],
        dots=_dots(asked, colours=colours),
        figures=_figures(asked),
        writers=[model["label"] for model in writers],
        writing=_writing(writers),
        samples=_samples(evaluation.get("prompts", []), writers=writers),
    )


def _tasks_of(models: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(task for model in models for task in model["tasks"]))


def _dots(models: Sequence[Mapping[str, Any]], *, colours: Sequence[Colour]) -> Markup | None:
    """A line for each task, a dot for each model, bars of 95 % on either side."""
    results = {task: [model["tasks"].get(task) for model in models] for task in _tasks_of(models)}
    shares = {task: each for task, each in results.items() if all(is_share(one) for one in each if one)}
    if not shares:
        return None
    step = 0.7 / max(len(models), 2)

    def draw(axes: Axes) -> None:
        for place, each in enumerate(shares.values()):
            for index, (result, colour) in enumerate(zip(each, colours, strict=True)):
                if result is None or result["value"] is None:
                    continue
                axes.errorbar(
                    100 * result["value"],
                    place + (index - (len(models) - 1) / 2) * step,
                    xerr=None if result["stderr"] is None else 100 * INTERVAL * result["stderr"],
                    fmt="o",
                    markersize=4.5,
                    elinewidth=1.1,
                    capsize=0,
                    color=PAINTS[colour],
                )
        axes.set_yticks(range(len(shares)), list(shares))
        axes.set_ylim(len(shares) - 0.5, -0.5)
        axes.set_xlim(left=-1)  # a dot at 0 is drawn whole
        axes.set_xlabel("%")
        axes.grid(axis="x", color=PAINTS["grid"], linewidth=0.6)
        axes.set_axisbelow(True)

    size = (_WIDTH, _MARGIN + _HEIGHT_OF_TASK * len(shares) * max(1.0, len(models) / 3))
    return drawing(draw, title="Tasks, % right with 95 % intervals", size=size)


def _figures(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = []
    for task in _tasks_of(models):
        known = next(model["tasks"][task] for model in models if task in model["tasks"])
        asked = [known["metric"], f"{known['items']:,}", str(known["fewshot"] or 0)]
        rows.append((task, [*asked, *(_written(model["tasks"].get(task)) for model in models)]))
    return rows


def _written(result: Mapping[str, Any] | None) -> str:
    return "–" if result is None else written(result)


def _writing(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    rows = [
        ("greedy token is the source's", [_percent(model["generation"].get("agreement")) for model in models]),
        ("KL to the source, nats per token", [_nats(model["generation"].get("kl_from_source")) for model in models]),
    ]
    for way, label in (("greedy", "written greedily"), ("sampled", "drawn")):
        of_way = [model["generation"].get(way) or {} for model in models]
        rows.append((f"4-grams repeated, {label}", [_percent(each.get("repeated")) for each in of_way]))
        for n in ("1", "2", "3", "4"):
            shares = [_percent(each.get("distinct", {}).get(n)) for each in of_way]
            rows.append((f"distinct {n}-grams, {label}", shares))
    return rows


def _samples(prompts: Sequence[Mapping[str, str]], *, writers: Sequence[Mapping[str, Any]]) -> list[Sample]:
    able = [model for model in writers if model["generation"].get("greedy")]
    return [
        Sample(
            prompt["domain"],
            prompt["text"],
            [
                (model["label"], *(model["generation"][way]["shown"][index] for way in ("greedy", "sampled")))
                for model in able
            ],
        )
        for index, prompt in enumerate(prompts)
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
