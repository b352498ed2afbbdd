"""The comparison table of a run, as values, as markdown and for the terminal; and what it says in one sentence.

Models are the columns and figures the rows, so that any number of domains fits a terminal of 100 columns and two
models are compared along a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from shearing.settings.quantities import format_parameters, format_tokens

Evaluation = Mapping[str, Any]

_WIDTH, _CELL = 78, 8
"""Characters of a terminal of 100 columns that are left for models, and of a cell."""

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
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), caption=escape(caption), caption_justify="left")
        table.add_column("", no_wrap=True)
        for model in headings:
            # Headings wrap between words and never inside one.
            table.add_column(
                escape(model), justify="right", min_width=max(map(len, model.split()), default=0), max_width=13
            )
        for index, section in enumerate(self.sections):
            if index > 0:
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
    columns = _Columns(list(evaluation["models"].values()))
    contest = "lowest of one shape and equal training tokens" if columns.contested else None
    sections = [
        _what_was_kept(columns),
        *_what_was_learned(columns),
        *_losses(columns),
        *_losses_outside(columns),
        *_speed(columns),
    ]
    return ComparisonTable([model["label"] for model in columns.models], sections, _note(evaluation), contest)


@dataclass(frozen=True)
class _Columns:
    """The models, and rows of figures about them."""

    models: Sequence[dict[str, Any]]

    @property
    def contested(self) -> bool:
        """Whether any two may be compared."""
        return len(set(map(_round, self.models))) < len(self.models)

    def any_has(self, name: str) -> bool:
        """Whether there is such a figure of any model."""
        return any(model.get(name) for model in self.models)

    def names(self, part: str) -> list[str]:
        """Names in a part of any model's figures, each once."""
        return list(dict.fromkeys(name for model in self.models for name in model.get(part, {})))

    def said(self, label: str, read: Callable[[dict[str, Any]], str | None]) -> tuple[str, list[Cell]]:
        """A row of words."""
        return label, [Cell(read(model) or "–") for model in self.models]

    def row(
        self,
        label: str,
        read: Callable[[dict[str, Any]], float | None],
        write: Callable[[float], str],
        *,
        contest: bool = False,
    ) -> tuple[str, list[Cell]]:
        """A row of figures; of those that may be compared the lowest is the best, if it is a contest."""
        values = [read(model) for model in self.models]
        best = _best_of_groups([_round(model) for model in self.models], values) if contest else set()
        return label, [
            Cell("–" if value is None else write(value), best=index in best) for index, value in enumerate(values)
        ]

    def loss(self, label: str, *path: str) -> tuple[str, list[Cell]]:
        """A row of losses, at this path in a model's figures."""

        def read(model: Any) -> float | None:
            for part in path:
                model = model.get(part, {})
            loss: float | None = model.get("loss")
            return loss

        return self.row(label, read, "{:.3f}".format, contest=True)


def _what_was_kept(columns: _Columns) -> Section:
    row = columns.row
    spent = [row("training tokens", lambda model: model["training_tokens"], format_tokens)]
    if columns.any_has("flops"):
        spent.insert(0, columns.said("units kept", lambda model: model["units"]))
        spent.append(row("FLOPs", lambda model: model["flops"], _format_flops))
    size = [
        row("parameters", lambda model: model["parameters"], format_parameters),
        row("without embeddings", lambda model: model["parameters_without_embeddings"], format_parameters),
    ]
    if columns.any_has("nonzero"):
        size += [
            row("not zero", lambda model: model.get("nonzero"), format_parameters),
            row(
                "share not zero",
                lambda model: None if "nonzero" not in model else model["nonzero"] / model["parameters"],
                lambda share: f"{100 * share:.1f} %",
            ),
        ]
    if columns.any_has("nonzero_bytes"):
        size.append(row("MB not zero", lambda model: model["nonzero_bytes"] / 1e6, "{:,.1f}".format))
    return Section("size", spent + size)


def _what_was_learned(columns: _Columns) -> Iterator[Section]:
    changed = [name for name in _UNITS if name in columns.names("changed_from_start")]
    if changed:
        rows = [columns.said(_UNITS[name], partial(_changed, name=name)) for name in changed]
        yield Section("units changed by learning", rows)


def _losses(columns: _Columns) -> Iterator[Section]:
    losses = [columns.loss(domain, "domains", domain) for domain in columns.names("domains")]
    yield Section("loss, nats per token", [*losses, columns.loss("mean", "mean")])
    rows = [columns.row("perplexity", lambda model: model["mean"]["perplexity"], _format_perplexity, contest=True)]
    if any(model["mean"]["bits_per_byte"] is not None for model in columns.models):
        rows.append(
            columns.row("bits per byte", lambda model: model["mean"]["bits_per_byte"], "{:.3f}".format, contest=True)
        )
    yield Section("all training domains" if columns.any_has("outside") else "all domains", rows)


def _losses_outside(columns: _Columns) -> Iterator[Section]:
    if outside := columns.names("outside"):
        losses = [columns.loss(domain, "outside", domain) for domain in outside]
        yield Section("text of no training domain, nats per token", [*losses, columns.loss("mean", "outside_mean")])


def _speed(columns: _Columns) -> Iterator[Section]:
    def of(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda model: (model.get("speed") or {}).get(name)

    if columns.any_has("speed"):
        prompt = columns.row("prompt, tokens/s", of("prefill_tokens_per_second"), "{:,.0f}".format)
        yield Section(
            "speed, batch 1", [prompt, columns.row("next token, ms", of("decode_milliseconds"), "{:.1f}".format)]
        )


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
