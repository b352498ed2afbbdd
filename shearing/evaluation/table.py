"""The comparison table of a run, as values, as markdown and for the terminal.

Models are the columns and figures the rows, so that any number of domains fits a terminal of 80 columns and two
models are compared along a line.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shearing.evaluation.tasks.figures import mean_share, written
from shearing.settings.quantities import format_parameters, format_tokens

Evaluation = Mapping[str, Any]

_WIDTH, _LABELS, _NARROW_LABELS = 80, 24, 14
"""Characters of a terminal, of labels: beside names, and beside letters where there are many models."""

UNITS = {
    "layers": "layers",
    "attention": "attention sub-layers",
    "mlp": "MLP sub-layers",
    "kv_groups": "KV groups",
    "query_heads": "query heads",
    "experts": "experts",
    "intermediate": "MLP units",
    "hidden": "hidden dimensions",
}
"""What tables call units, from layers to hidden dimensions."""


@dataclass(frozen=True)
class Cell:
    """One figure as text; `best` where it beats the models it is fairly compared with."""

    text: str
    best: bool = False

    @property
    def marked(self) -> str:
        """The text with a star where it is the best."""
        return f"★ {self.text}" if self.best else self.text


@dataclass(frozen=True)
class Section:
    """Rows under one heading: (label, one cell per model)."""

    heading: str
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class ComparisonTable:
    """What was measured, one column per model.

    Attributes:
        models: column headings.
        sections: what was kept at what cost, losses, speed.
        note: how the figures were measured.
        contest: what the best figures are the best of; None where nothing is compared.
    """

    models: list[str]
    sections: list[Section]
    note: str
    contest: str | None

    def markdown(self) -> str:
        """The table as GitHub markdown; best figures in bold."""
        lines = [
            "| | " + " | ".join(_markdown(model) for model in self.models) + " |",
            "|---|" + "---:|" * len(self.models),
        ]
        for section in self.sections:
            if section is not self.sections[0]:
                lines.append(f"| *{_markdown(section.heading)}* |" + " |" * len(self.models))
            for label, cells in section.rows:
                texts = [f"**{cell.text}**" if cell.best else cell.text for cell in cells]
                lines.append(f"| {_markdown(label)} | " + " | ".join(texts) + " |")
        return "\n".join(lines) + "\n\n" + (f"Bold: {self.contest}. " if self.contest else "") + self.note + "\n"

    def rich(self) -> Group:
        """The table for a terminal of 80 columns; best figures bold green with a star, which shows without colour too.

        Where the names of models are too long for headings, they have letters, and the names stand below; models that
        find no room beside the others have a table of their own under them.
        """
        caption = (f"★ {self.contest}. " if self.contest else "") + self.note
        # Two characters of padding, and one between columns; headings wrap between words and never inside one.
        named = [
            max(cell, *map(len, model.split() or [""])) for cell, model in zip(self._widths, self.models, strict=True)
        ]
        left = _WIDTH - 4 - sum(width + 3 for width in named)
        longest = min(_LABELS, max(len(label) for section in self.sections for label, _ in section.rows))
        for index, model in enumerate(self.models):
            # What labels leave over keeps names on one line.
            if 0 < (wanted := len(model) - named[index]) <= left - longest:
                named[index] += wanted
                left -= wanted
        if longest <= left:
            table = self._table(self.models, dict(enumerate(named)), labels=min(_LABELS, left), narrow=False)
            return Group(table, _caption(caption))
        headings = [chr(ord("a") + index) for index in range(len(self.models))]
        parts: list[list[int]] = [[]]
        for index, width in enumerate(self._widths):
            taken = sum(self._widths[each] + 1 for each in parts[-1])
            if parts[-1] and _NARROW_LABELS + 1 + taken + width > _WIDTH:
                parts.append([])
            parts[-1].append(index)
        tables: list[RenderableType] = []
        for part in parts:
            widths = dict(zip(part, (self._widths[each] for each in part), strict=True))
            left = _WIDTH - 1 - sum(width + 1 for width in widths.values())
            labels = max(_NARROW_LABELS, min(_LABELS, left))
            tables += [self._table(headings, widths, labels=labels, narrow=True), ""]
        names = "\n".join(f"{letter}  {name}" for letter, name in zip(headings, self.models, strict=True))
        return Group(*tables, _caption(f"{names}\n{caption}"))

    @property
    def _widths(self) -> list[int]:
        """Characters of the longest figure of each model."""
        rows = [cells for section in self.sections for _, cells in section.rows]
        return [max(len(cells[index].marked) for cells in rows) for index in range(len(self.models))]

    def _table(self, headings: Sequence[str], widths: Mapping[int, int], *, labels: int, narrow: bool) -> Table:
        """Some of the models, by their indices; narrow: columns stand close, and labels fold between any letters."""
        table = Table(box=None if narrow else box.SIMPLE_HEAD, padding=(0, 1, 0, 0) if narrow else (0, 1))
        table.add_column("", max_width=labels, min_width=labels if narrow else None, overflow="fold")
        for index, width in widths.items():
            table.add_column(escape(headings[index]), justify="right", width=width, no_wrap=narrow)
        for section in self.sections:
            if section is not self.sections[0] and narrow:
                table.add_row()
            if section is not self.sections[0]:
                table.add_row(f"[italic dim]{section.heading}[/]")
            for label, cells in section.rows:
                shown = [cells[index] for index in widths]
                texts = [f"[bold green]{cell.marked}[/]" if cell.best else cell.text for cell in shown]
                table.add_row(escape(label), *texts)
            if section is not self.sections[-1]:
                table.add_section()
        return table


def _caption(text: str) -> RenderableType:
    return Constrain(Text(text, style="table.caption"), _WIDTH)


def comparison_table(evaluation: Evaluation) -> ComparisonTable:
    """Lay out the results of a run.

    Models are compared with those of the same `group` (in evaluation.json) that were trained on as many tokens. The
    best of two or more is marked.

    Args:
        evaluation: the content of evaluation.json.
    """
    of = _Rows(list(evaluation["models"].values()))
    sections = [
        *of.spent(),
        *of.changed(),
        *of.losses(),
        *of.means(),
        *of.outside(),
        *of.tasks(),
        *of.writing(),
        *of.speeds(),
    ]
    contest = "lowest of one shape and equal training tokens" if len(set(of.rounds)) < len(of.rounds) else None
    return ComparisonTable([model["label"] for model in of.models], sections, _note(evaluation), contest)


class _Rows:
    """The sections of the table, each a list of one if there is something to say in it, else empty."""

    def __init__(self, models: Sequence[dict[str, Any]]) -> None:
        self.models = models
        self.rounds = [round_of(model) for model in models]

    def spent(self) -> list[Section]:
        """Sizes, and what was spent."""
        rows = [self._row("training tokens", _field("training_tokens"), format_tokens, contest=False)]
        if any("flops" in model for model in self.models):
            rows.insert(0, self._said("units kept", lambda model: model["units"]))
            rows.append(self._row("FLOPs", _field("flops"), _format_flops, contest=False))
        embedded = _field("parameters_without_embeddings")
        rows.append(self._row("parameters", _field("parameters"), format_parameters, contest=False))
        rows.append(self._row("without embeddings", embedded, format_parameters, contest=False))
        if any("nonzero" in model for model in self.models):
            rows.append(self._row("not zero", _field("nonzero"), format_parameters, contest=False))
            rows.append(
                self._row("share not zero", _share_not_zero, lambda share: f"{100 * share:.1f} %", contest=False)
            )
        if any("nonzero_bytes" in model for model in self.models):
            rows.append(self._row("MB not zero", _megabytes_not_zero, "{:,.1f}".format, contest=False))
        return [Section("size", rows)]

    def changed(self) -> list[Section]:
        """Units changed by learning."""
        names = [name for name in UNITS if any(name in model.get("changed_from_start", {}) for model in self.models)]
        counts = [self._said(UNITS[name], partial(changed_units, name=name)) for name in names]
        return [Section("units changed by learning", counts)] if counts else []

    def losses(self) -> list[Section]:
        """Loss of each domain and their mean."""
        rows = [self._row(domain, _field("domains", domain, "loss"), _format_loss) for domain in self._all("domains")]
        rows.append(self._row("mean", _field("mean", "loss"), _format_loss))
        return [Section("loss, nats per token", rows)]

    def means(self) -> list[Section]:
        """Other figures of all domains together."""
        rows = [self._row("perplexity", _field("mean", "perplexity"), _format_perplexity)]
        if any(model["mean"]["bits_per_byte"] is not None for model in self.models):
            rows.append(self._row("bits per byte", _field("mean", "bits_per_byte"), _format_loss))
        return [Section("all training domains" if self._all("outside") else "all domains", rows)]

    def outside(self) -> list[Section]:
        """Loss on text of no training domain."""
        domains = self._all("outside")
        if not domains:
            return []
        rows = [self._row(domain, _field("outside", domain, "loss"), _format_loss) for domain in domains]
        rows.append(self._row("mean", _field("outside_mean", "loss"), _format_loss))
        return [Section("text of no training domain, nats per token", rows)]

    def speeds(self) -> list[Section]:
        """Speed, where it was measured."""
        if not any(model.get("speed") for model in self.models):
            return []
        prompt, token = _field("speed", "prefill_tokens_per_second"), _field("speed", "decode_milliseconds")
        rows = [
            self._row("prompt, tokens/s", prompt, "{:,.0f}".format, contest=False),
            self._row("next token, ms", token, "{:.1f}".format, contest=False),
        ]
        return [Section("speed, batch 1", rows)]

    def tasks(self) -> list[Section]:
        """What models reach on tasks: no star, as most differences lie within the errors."""
        names = self._all("tasks")
        if not names:
            return []
        rows = []
        for name in names:
            of_task = [(model.get("tasks") or {}).get(name) for model in self.models]
            rows.append((name, [Cell("–" if each is None else written(each)) for each in of_task]))
        means = [mean_share(model.get("tasks") or {}) for model in self.models]
        if len(names) > 1:
            rows.append(("mean", [Cell("–" if mean is None else f"{100 * mean:.1f}") for mean in means]))
        return [Section("tasks, % ± error", rows)]

    def writing(self) -> list[Section]:
        """What continuations of prompts are like, and how near a model is to the source."""
        if not any(model.get("generation") for model in self.models):
            return []
        rows = [
            self._row(label, _field("generation", *names), write, contest=False)
            for label, names, write in (
                ("repeated, greedy", ("greedy", "repeated"), _format_percent),
                ("repeated, drawn", ("sampled", "repeated"), _format_percent),
                ("distinct, drawn", ("sampled", "distinct", "2"), _format_percent),
                ("source's token", ("agreement",), _format_percent),
                ("KL to source", ("kl_from_source",), _format_loss),
            )
        ]
        return [Section("writing, % and nats", rows)]

    def _all(self, of: str) -> list[str]:
        return list(dict.fromkeys(domain for model in self.models for domain in model.get(of, {})))

    def _row(
        self,
        label: str,
        read: Callable[[dict[str, Any]], float | None],
        write: Callable[[float], str],
        *,
        contest: bool = True,
    ) -> tuple[str, list[Cell]]:
        values = [read(model) for model in self.models]
        best = _best_of_groups(self.rounds, values) if contest else set()
        return label, [
            Cell("–" if value is None else write(value), best=index in best) for index, value in enumerate(values)
        ]

    def _said(self, label: str, read: Callable[[dict[str, Any]], str | None]) -> tuple[str, list[Cell]]:
        return label, [Cell(read(model) or "–") for model in self.models]


_format_loss = "{:.3f}".format


def _format_percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _field(*names: str) -> Callable[[dict[str, Any]], float | None]:
    """Reads a figure of a model, by the names that lead to it; None where there is none."""

    def read(model: dict[str, Any]) -> float | None:
        value: Any = model
        for name in names:
            value = (value or {}).get(name)
        figure: float | None = value
        return figure

    return read


def _share_not_zero(model: dict[str, Any]) -> float | None:
    return None if "nonzero" not in model else model["nonzero"] / model["parameters"]


def _megabytes_not_zero(model: dict[str, Any]) -> float | None:
    return None if "nonzero_bytes" not in model else model["nonzero_bytes"] / 1e6


def round_of(model: Mapping[str, Any]) -> Hashable:
    """What models have in common that may be compared: shape, place in the run, training tokens."""
    return model["group"], model["training_tokens"]


def changed_units(model: Mapping[str, Any], *, name: str) -> str | None:
    """How many units of a kind mask learning changed, as text; None where nothing is said of it."""
    count: int | str | None = model.get("changed_from_start", {}).get(name)
    return f"{count:,}" if isinstance(count, int) else count


def _best_of_groups(groups: Sequence[Hashable], values: Sequence[float | None]) -> set[int]:
    """Indices of the lowest value of each group with at least two values."""
    best: set[int] = set()
    for group in set(groups):
        members = [(value, index) for index, value in enumerate(values) if groups[index] == group and value is not None]
        if len(members) > 1:
            lowest = min(members)[0]
            best.update(index for value, index in members if value == lowest)
    return best


def _note(evaluation: Evaluation) -> str:
    settings = evaluation["settings"]
    note = (
        f"{settings['tokens_per_domain']:,} {settings.get('split', 'held-out')} tokens per domain, "
        f"{settings['sequence_length']:,} tokens of context, {settings['precision']}"
    )
    timed = next((model["speed"] for model in evaluation["models"].values() if model.get("speed")), None)
    if timed:
        note += f"; speed on {timed['device']}, {timed['dtype']}"
        note += f", {timed['threads']} thread{'s' * (timed['threads'] != 1)}" if timed["device"] == "cpu" else ""
    return note + "."


def _format_flops(count: float) -> str:
    return f"{count:.1e}".replace("e+", "e") if count else "0"


def _format_perplexity(value: float) -> str:
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _markdown(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")
