"""The comparison table of a run, as values, as markdown and for the terminal; and what it says in one sentence.

Models are the columns and figures the rows, so that any number of domains fits a terminal of 100 columns and two
models are compared along a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from shearing.settings.quantities import format_parameters, format_tokens

Evaluation = Mapping[str, Any]

_WIDTH, _CELL, _LABELS = 78, 8, 14
"""Characters of a terminal of 100 columns that are left for models, of a cell, and of labels where there are many."""

_UNITS = {
    "layers": "layers",
    "attention": "attention sub-layers",
    "mlp": "MLP sub-layers",
    "kv_groups": "KV groups",
    "query_heads": "query heads",
    "intermediate": "MLP units",
    "hidden": "hidden dimensions",
}


@dataclass(frozen=True)
class Cell:
    """One figure as text; `best` where it beats the models it is fairly compared with."""

    text: str
    best: bool = False


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

    def rich(self) -> Table:
        """The table for a terminal; best figures bold green with a star, so that they also show without colour.

        Where the names of models are too long for headings, they have letters, and the names stand below.
        """
        caption = (f"★ {self.contest}. " if self.contest else "") + self.note
        headings = self.models
        if sum(max(_CELL, *map(len, model.split())) + 2 for model in self.models) > _WIDTH:
            headings = [chr(ord("a") + index) for index in range(len(self.models))]
            names = "\n".join(f"{letter}  {name}" for letter, name in zip(headings, self.models, strict=True))
            caption = f"{names}\n{caption}"
        # Many models: columns stand close, and labels fold before a figure loses a digit.
        lettered = headings is not self.models
        table = Table(
            box=None if lettered else box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0) if lettered else (0, 1),
            caption=escape(caption),
            caption_justify="left",
        )
        table.add_column("", no_wrap=not lettered, min_width=_LABELS if lettered else None, overflow="fold")
        for model in headings:
            # Headings wrap between words and never inside one.
            table.add_column(
                escape(model),
                justify="right",
                min_width=max(map(len, model.split()), default=0),
                max_width=13,
                no_wrap=lettered,
            )
        for index, section in enumerate(self.sections):
            if index > 0:
                if lettered:
                    table.add_row()
                table.add_row(f"[italic dim]{section.heading}[/]")
            for label, cells in section.rows:
                texts = [f"[bold green]★ {cell.text}[/]" if cell.best else cell.text for cell in cells]
                table.add_row(escape(label), *texts)
            if index + 1 < len(self.sections):
                table.add_section()
        return table


def comparison_table(evaluation: Evaluation) -> ComparisonTable:
    """Lay out the results of a run.

    Models are compared with those of the same `group` (in evaluation.json) that were trained on as many tokens. The
    best of two or more is marked.

    Args:
        evaluation: the content of evaluation.json.
    """
    of = _Rows(list(evaluation["models"].values()))
    sections = [*of.spent(), *of.changed(), *of.losses(), *of.means(), *of.outside(), *of.speeds()]
    contest = "lowest of one shape and equal training tokens" if len(set(of.rounds)) < len(of.rounds) else None
    return ComparisonTable([model["label"] for model in of.models], sections, _note(evaluation), contest)


class _Rows:
    """The sections of the table, each a list of one if there is something to say in it, else empty."""

    def __init__(self, models: Sequence[dict[str, Any]]) -> None:
        self.models = models
        self.rounds = [_round(model) for model in models]

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
        names = [name for name in _UNITS if any(name in model.get("changed_from_start", {}) for model in self.models)]
        counts = [self._said(_UNITS[name], partial(_changed, name=name)) for name in names]
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


def verdict(evaluation: Evaluation) -> str:
    """One or two sentences on what a run achieved, computed from its numbers.

    Args:
        evaluation: the content of evaluation.json; models that are absent are left out of the sentence.
    """
    models = evaluation["models"]
    source, cut, sparse, final = (models.get(name) for name in ("source", "compact", "sparse", "final"))
    result = final or sparse or cut
    sentences = []
    rounds = Counter(_round(model) for model in models.values() if cut and model["group"] == cut["group"])
    for each, count in rounds.items():
        measured = [model for model in models.values() if _round(model) == each and model["mean"]["loss"] is not None]
        if count > 1 and len(measured) == count:
            sentences.append(_lowest(measured))
    if cut and cut.get("changed_from_start") and cut["started_by"] != "open":
        sentences.append(_learned(cut))
    if source and result and source["mean"]["loss"] is not None and result["mean"]["loss"] is not None:
        after = (
            "after continued pretraining"
            if final
            else "right after sparsification"
            if sparse
            else "right after cutting"
        )
        sentence = (
            f"{_size(source, result)} the mean held-out loss is {result['mean']['loss']:.2f} {after}, "
            f"against {source['mean']['loss']:.2f} for the source"
        )
        if final and sparse and sparse["mean"]["loss"] is not None:
            sentence += f" and {sparse['mean']['loss']:.2f} before training"
        if source.get("speed") and result.get("speed"):
            faster = source["speed"]["decode_milliseconds"] / result["speed"]["decode_milliseconds"]
            sentence += f", and it writes a token {faster:.1f}× as fast"
        sentences.append(sentence + ".")
    return " ".join(sentences) or "Nothing has been compared yet."


def _size(source: dict[str, Any], result: dict[str, Any]) -> str:
    """How much of the source is left, as the beginning of a sentence."""
    before, after, nonzero = source["parameters"], result["parameters"], result.get("nonzero")
    if after < before:
        parameters = f"At {format_parameters(after)} of {format_parameters(before)} parameters"
        zeros = "" if nonzero is None else f", {100 * nonzero / after:.1f} % of them not zero"
        return f"{parameters} ({before / after:.1f}× smaller{zeros})"
    if nonzero is None:
        return "At the size of the source"
    return f"With {format_parameters(nonzero)} of {format_parameters(after)} parameters not zero"


def _round(model: Mapping[str, Any]) -> Hashable:
    """What models have in common that may be compared: shape, place in the run, training tokens."""
    return model["group"], model["training_tokens"]


def _lowest(models: Sequence[dict[str, Any]]) -> str:
    """Which of several ways to choose the same shape has the lowest loss."""
    first, second = sorted(models, key=lambda model: model["mean"]["loss"])[:2]
    domains = [domain for domain, figures in first["domains"].items() if figures["loss"] is not None]
    won = sum(
        all(
            other is first
            or other["domains"][domain]["loss"] is None
            or first["domains"][domain]["loss"] < other["domains"][domain]["loss"]
            for other in models
            if domain in other["domains"]
        )
        for domain in domains
    )
    trained = first["training_tokens"]
    after = f"after {format_tokens(trained)} training tokens" if trained else "untrained"
    return (
        f"Of {len(models)} ways to choose the same shape, {after}, the lowest loss is that of: {first['label']} "
        f"(mean {first['mean']['loss']:.2f}, lowest on {won} of {len(domains)} domains; next, {second['label']}: "
        f"{second['mean']['loss']:.2f})."
    )


def _learned(cut: Mapping[str, Any]) -> str:
    """How much mask learning had to do with the units that stay."""
    counts = {name: count for name, count in cut["changed_from_start"].items() if count}
    if not counts:
        return f"Mask learning changed none of the units chosen by {cut['started_by']}."
    listed = ", ".join(f"{_changed(cut, name=name)} {_UNITS[name]}" for name in _UNITS if name in counts)
    return f"Mask learning changed, of what {cut['started_by']} chose: {listed}."


def _changed(model: Mapping[str, Any], *, name: str) -> str | None:
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
