"""What `inspection` found, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from data_tools.inspection.inspection import DomainFigures, Inspection
from shearing.data.corpus.format import SPLITS
from shearing.files.pictures import GRID, INK, MUTED, quiet_axes, save_picture
from shearing.settings.quantities import format_tokens

# The report's colours, on paper.
COLOURS = ("#2563a8", "#d9730d", "#1f8a5f", "#c43d5a", "#7b54b8", "#8a6a16", "#2b9ab0", "#75808d")
DOMAINS_SHOWN = 24
CHARACTERS_SHOWN = 400
_UNBOUNDED = 1 << 16


def render(inspection: Inspection, *, samples: int) -> RenderableType:
    """Table, texts and problems.

    Args:
        samples: decoded documents of each domain.
    """
    parts: list[RenderableType] = [_Domains(*_columns_and_rows(inspection)), *_notes(inspection)]
    for name, figures in inspection.domains.items():
        for text in figures.texts[:samples]:
            shown = text if len(text) <= CHARACTERS_SHOWN else text[:CHARACTERS_SHOWN] + " …"
            parts.append(Text.assemble((f"\n{name}  ", "bold"), shown))
    problems = inspection.problems
    if problems:
        parts.append(Text("\nproblems", style="bold red"))
        parts += [Text(f"  {problem}") for problem in problems]
    else:
        parts.append(Text("\nno problems found", style="bold"))
    return Group(*parts)


@dataclass(frozen=True)
class _Domains:
    """A row for each domain; where that is too wide, a block for each: no figure and no heading is cut off."""

    columns: Sequence[str]
    rows: Mapping[str, Sequence[str]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table()
        for i, column in enumerate(("domain", *self.columns)):
            table.add_column(column, justify="right" if i else "left", no_wrap=True)
        for name, row in self.rows.items():
            table.add_row(name, *row)
        if table.__rich_measure__(console, options.update_width(_UNBOUNDED)).minimum <= options.max_width:
            yield table
            return
        for name, row in self.rows.items():
            block = Table(title=name, title_justify="left", title_style="bold", box=None, show_header=False)
            block.add_column(no_wrap=True)
            block.add_column(no_wrap=True, justify="right")
            for column, figure in zip(self.columns, row, strict=True):
                block.add_row(column, figure)
            yield block


def _columns_and_rows(inspection: Inspection) -> tuple[list[str], dict[str, list[str]]]:
    planned = any(figures.passes is not None for figures in inspection.domains.values())
    columns = [
        "documents",
        "training tokens",
        "validation",
        "test",
        "share",
        "bytes/token",
        "median length",
        "p90",
        "longest",
        "duplicates",
        "also elsewhere",
        "left out",
        *(["passes"] if planned else []),
    ]
    rows = {}
    duplicates = inspection.duplicates
    mark = "" if duplicates.sampled == 1.0 else f" of {duplicates.sampled:.1%}"
    for name, figures in inspection.domains.items():
        manifest = figures.manifest
        median, p90, longest = np.quantile(figures.lengths, (0.5, 0.9, 1.0))
        approximately = "~" if figures.lengths_sampled else ""
        rows[name] = [
            f"{manifest.documents:,}",
            *(f"{figures.tokens[split]:,}" for split in SPLITS),
            f"{figures.share:.1%}",
            f"{manifest.bytes / manifest.tokens:.2f}",
            *(f"{approximately}{figure:,.0f}" for figure in (median, p90, longest)),
            f"{duplicates.within[name]:,}{mark}",
            f"{duplicates.across[name]:,}{mark}",
            f"{sum(figures.manifest.left_out.values()):,}",
            *([f"{figures.passes:.2f}"] if figures.passes is not None else []),
        ]
    return columns, rows


def _notes(inspection: Inspection) -> list[Text]:
    """What was left out and why; what comes from a sample."""
    notes = []
    for name, figures in inspection.domains.items():
        if figures.manifest.left_out:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in figures.manifest.left_out.items())
            notes.append(f"left out of {name}: {reasons}")
    if any(figures.lengths_sampled for figures in inspection.domains.values()):
        notes.append("~: from a sample of the documents; the longest of all may be longer")
    if inspection.duplicates.sampled < 1.0:
        notes.append(f"duplicates were counted among {inspection.duplicates.sampled:.1%} of all texts")
    read = sum(figures.tokens_read for figures in inspection.domains.values())
    decoded = sum(len(figures.texts) for figures in inspection.domains.values())
    total = sum(figures.manifest.train.tokens for figures in inspection.domains.values())
    notes.append(
        f"repeated tokens were looked for in {read:,} of {total:,} training tokens, wrong encodings in "
        + (f"{decoded:,} documents" if inspection.decodable else "none: there is no tokenizer.json in the corpus")
    )
    return [Text(note, style="dim") for note in notes]


def draw(inspection: Inspection, path: Path) -> None:
    """Write a picture of the domains' shares and of how long their documents are; its kind is the file's ending."""
    largest = sorted(inspection.domains, key=lambda name: -inspection.domains[name].share)
    settings: Any = {
        **quiet_axes(),
        "font.size": 8.5,
        "ytick.color": INK,
        "axes.spines.left": True,
        "svg.hashsalt": "inspection",
    }
    shown = largest[:DOMAINS_SHOWN]
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(10, 1.6 + 0.24 * max(6, len(shown))), layout="constrained", dpi=150)
        shares, lengths = figure.subplots(1, 2)
        _draw_shares(shares, inspection.domains, shown=shown)
        _draw_lengths(lengths, inspection.domains, shown=largest[: len(COLOURS)])
        save_picture(figure, path)


def _draw_shares(axes: Any, domains: Mapping[str, DomainFigures], *, shown: list[str]) -> None:
    names, values = list(shown), [domains[name].share for name in shown]
    colours = [COLOURS[i] if i < len(COLOURS) else COLOURS[-1] for i in range(len(shown))]
    if len(domains) > len(shown):
        names.append(f"{len(domains) - len(shown)} others")
        values.append(1.0 - sum(values))
        colours.append(GRID)
    axes.barh(names, values, color=colours, height=0.7)
    for i, name in enumerate(names):
        tokens = f" · {format_tokens(domains[name].manifest.train.tokens)}" if name in domains else ""
        axes.annotate(f" {values[i]:.1%}{tokens}", (values[i], i), va="center", color=MUTED)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(values))
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Share of the training tokens", loc="left")


def _draw_lengths(axes: Any, domains: Mapping[str, DomainFigures], *, shown: list[str]) -> None:
    longest = max(int(domains[name].lengths.max()) for name in shown)
    edges = np.geomspace(1, max(2, longest) * 1.01, 41)
    for i, name in enumerate(shown):
        counts, _ = np.histogram(domains[name].lengths, bins=edges)
        share = counts / max(1, counts.sum())
        axes.plot(np.sqrt(edges[:-1] * edges[1:]), share, color=COLOURS[i], linewidth=1.4, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a document")
    axes.set_title("How long documents are", loc="left")
    axes.legend(frameon=False, fontsize=7.5)
