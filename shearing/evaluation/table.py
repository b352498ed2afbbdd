"""The comparison table of a run, as values, as markdown and for the terminal; and what it says in one sentence.

Models are the columns and figures the rows, so that any number of domains fits a terminal of 100 columns and two
models are compared along a line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from shearing.settings.quantities import format_parameters, format_tokens

Evaluation = Mapping[str, Any]


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
        sections: size, losses, speed.
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
        """The table for a terminal; best figures bold green with a star, so that they also show without colour."""
        caption = (f"★ {self.contest}. " if self.contest else "") + self.note
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), caption=escape(caption), caption_justify="left")
        table.add_column("", no_wrap=True)
        for model in self.models:
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

    Models are compared with those of the same `group` (in evaluation.json): same shape, same training. The best of a
    group of two or more is marked.

    Args:
        evaluation: the content of evaluation.json.
    """
    models: Sequence[dict[str, Any]] = list(evaluation["models"].values())
    domains = list(dict.fromkeys(domain for model in models for domain in model["domains"]))
    outside = list(dict.fromkeys(domain for model in models for domain in model.get("outside", {})))

    def row(
        label: str,
        read: Callable[[dict[str, Any]], float | None],
        write: Callable[[float], str],
        *,
        contest: bool = True,
    ) -> tuple[str, list[Cell]]:
        values = [read(model) for model in models]
        best = _best_of_groups([model["group"] for model in models], values) if contest else set()
        return label, [
            Cell("–" if value is None else write(value), best=index in best) for index, value in enumerate(values)
        ]

    def domain_loss(domain: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda model: model["domains"].get(domain, {}).get("loss")

    def outside_loss(domain: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda model: model.get("outside", {}).get(domain, {}).get("loss")

    def mean(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda model: model["mean"][name]

    def speed(name: str) -> Callable[[dict[str, Any]], float | None]:
        return lambda model: (model.get("speed") or {}).get(name)

    sections = [
        Section(
            "size",
            [
                row("parameters", lambda model: model["parameters"], format_parameters, contest=False),
                row(
                    "without embeddings",
                    lambda model: model["parameters_without_embeddings"],
                    format_parameters,
                    contest=False,
                ),
                row("training tokens", lambda model: model["training_tokens"], format_tokens, contest=False),
            ],
        ),
        Section(
            "loss, nats per token",
            [row(domain, domain_loss(domain), "{:.3f}".format) for domain in domains]
            + [row("mean", mean("loss"), "{:.3f}".format)],
        ),
        Section(
            "all training domains" if outside else "all domains",
            [row("perplexity", mean("perplexity"), _format_perplexity)],
        ),
    ]
    if outside:
        sections.append(
            Section(
                "text of no training domain, nats per token",
                [row(domain, outside_loss(domain), "{:.3f}".format) for domain in outside]
                + [row("mean", lambda model: model.get("outside_mean", {}).get("loss"), "{:.3f}".format)],
            )
        )
    if any("nonzero" in model for model in models):
        sections[0].rows.extend(
            [
                row("not zero", lambda model: model.get("nonzero"), format_parameters, contest=False),
                row(
                    "share not zero",
                    lambda model: None if "nonzero" not in model else model["nonzero"] / model["parameters"],
                    lambda share: f"{100 * share:.1f} %",
                    contest=False,
                ),
            ]
        )
    if any("nonzero_bytes" in model for model in models):
        sections[0].rows.append(
            row("MB not zero", lambda model: model["nonzero_bytes"] / 1e6, "{:,.1f}".format, contest=False)
        )
    if any(model["mean"]["bits_per_byte"] is not None for model in models):
        sections[2].rows.append(row("bits per byte", mean("bits_per_byte"), "{:.3f}".format))
    if any(model.get("speed") for model in models):
        sections.append(
            Section(
                "speed, batch 1",
                [
                    row("prompt, tokens/s", speed("prefill_tokens_per_second"), "{:,.0f}".format, contest=False),
                    row("next token, ms", speed("decode_milliseconds"), "{:.1f}".format, contest=False),
                ],
            )
        )
    groups = [model["group"] for model in models]
    contest = "lowest among models of the same shape and training stage" if len(set(groups)) < len(groups) else None
    return ComparisonTable([model["label"] for model in models], sections, _note(evaluation), contest)


def verdict(evaluation: Evaluation) -> str:
    """One or two sentences on what a run achieved, computed from its numbers.

    Args:
        evaluation: the content of evaluation.json; models that are absent are left out of the sentence.
    """
    models = evaluation["models"]
    source, cut, sparse, final = (models.get(name) for name in ("source", "compact", "sparse", "final"))
    result = final or sparse or cut
    sentences = []
    if cut:
        rivals = [model for name, model in models.items() if model["group"] == cut["group"] and name != "compact"]
        rivals = [model for model in rivals if model["mean"]["loss"] is not None]
        if rivals and cut["mean"]["loss"] is not None:
            sentences.append(_against_rivals(cut, rivals))
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


def _against_rivals(cut: dict[str, Any], rivals: Sequence[dict[str, Any]]) -> str:
    domains = [domain for domain, figures in cut["domains"].items() if figures["loss"] is not None]
    won = sum(
        all(
            rival["domains"][domain]["loss"] is None
            or cut["domains"][domain]["loss"] < rival["domains"][domain]["loss"]
            for rival in rivals
            if domain in rival["domains"]
        )
        for domain in domains
    )
    next_best = min(rivals, key=lambda model: model["mean"]["loss"])
    count = f"all {won}" if won == len(domains) > 1 else f"{won or 'none'} of {'the ' if not won else ''}{len(domains)}"
    where = f"on {count} domains"
    # Mask learning trains the weights too; baselines are usually cut from the source as it is.
    trained = {model["training_tokens"] for model in rivals}
    head_start = (
        f" (trained on {format_tokens(cut['training_tokens'])} tokens, the others on "
        f"{format_tokens(max(trained)) if max(trained) else 'none'})"
        if trained != {cut["training_tokens"]}
        else ""
    )
    return (
        f"Right after cutting, {cut['label']}{head_start} have the lowest loss of {len(rivals) + 1} ways to choose the "
        f"same shape {where} (mean {cut['mean']['loss']:.2f}; {next_best['label']}: {next_best['mean']['loss']:.2f})."
    )


def _best_of_groups(groups: Sequence[str], values: Sequence[float | None]) -> set[int]:
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


def _format_perplexity(value: float) -> str:
    if value >= 1e5:
        return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _markdown(text: str) -> str:
    return text.replace("|", r"\|").replace("*", r"\*")
