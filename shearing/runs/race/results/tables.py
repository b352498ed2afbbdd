"""The tables of a race, for a terminal and as markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shearing.runs.race.methods import LEARNED
from shearing.runs.race.plan import RacePlan
from shearing.settings.quantities import format_tokens

NOTE = (
    "Loss in nats per token on test text, means over seeds. - start: differences to the start of the same seed, their "
    "mean ± its standard error [lowest, highest]. outside: text of no training domain. units: hash of the unit set of "
    "the first seed; equal hashes, equal units."
)
OWN_FORMS = "sizes by layer as each method's scores give them, as many parameters, not trained"
_TITLES = {"equal_tokens": "equal tokens", "equal_flops": "equal FLOPs"}


def rich_tables(results: Mapping[str, Any]) -> RenderableType:
    """All tables, for a terminal: figures over all text, then by domain."""
    parts: list[RenderableType] = []
    for title, table in tables_of(results):
        parts.append(_rich(title, _overall(table)))
        parts.append(_rich("by domain", _by_domain(table)))
        parts += [*(Text(line) for line in _said(table)), ""]
    if results["own_forms"]:
        parts += [_rich(OWN_FORMS, _own_forms(results)), ""]
    return Group(*parts, Text(NOTE, style="dim"))


def markdown_tables(results: Mapping[str, Any]) -> str:
    """All tables, as GitHub markdown."""
    parts = []
    for title, table in tables_of(results):
        said = "\n".join(f"- {line}" for line in _said(table))
        parts += [f"## {title}", _markdown(_overall(table)), _markdown(_by_domain(table)), *filter(None, [said])]
    if results["own_forms"]:
        parts += [f"## {OWN_FORMS}", _markdown(_own_forms(results))]
    return "\n\n".join([*parts, NOTE]) + "\n"


Cells = list[list[str]]
"""Headings, then rows; the first of each is a text, the others are figures."""


def _overall(table: Mapping[str, Any]) -> Cells:
    headings = ["units chosen by", "seeds", "tokens", "FLOPs", "units", "after cutting", "mean", "- start"]
    return [headings, *(_figures(row, total=len(headings)) for row in table["rows"])]


def _figures(row: Mapping[str, Any], *, total: int) -> list[str]:
    if not row["seeds"]:
        said = "not run yet"
        if row["steps"] is None:
            said = "choosing alone takes more"
        elif row["failed"]:
            said = f"failed: {next(iter(row['failed'].values()))}"
        return [f"{row['title']} ({said})", *["–"] * (total - 1)]
    failed = f" ({len(row['failed'])} failed)" if row["failed"] else ""
    return [
        _title(row),
        f"{len(row['seeds'])}{failed}",
        format_tokens(row["tokens"]),
        f"{row['flops']:.2e}",
        (row["units"][0] or "–")[:8],
        _loss(row["after_cutting"]),
        _loss(row["mean"]),
        _difference(row["minus_start"]),
    ]


def _title(row: Mapping[str, Any]) -> str:
    """What learned is called so only where it changed something; else it is its start under another name."""
    counts = [count for count in row["units_changed"] if count is not None]
    if row["method"] != LEARNED or not counts:
        return str(row["title"])
    low, high = min(counts), max(counts)
    return f"{row['title']} ({f'{low:,}' if low == high else f'{low:,} to {high:,}'} units changed)"


def _by_domain(table: Mapping[str, Any]) -> Cells:
    rows = [row for row in table["rows"] if row["seeds"]]
    domains = list(rows[0]["domains"]) if rows else []
    outside = list(rows[0].get("outside", {})) if rows else []
    headings = ["units chosen by", *domains, *outside, *(["outside", "- start"] if outside else [])]
    return [headings, *(_losses(row, domains=domains, outside=outside) for row in rows)]


def _losses(row: Mapping[str, Any], *, domains: list[str], outside: list[str]) -> list[str]:
    cells = [_title(row), *(_loss(row["domains"][domain]) for domain in domains)]
    if outside:
        cells += [_loss(row.get("outside", {}).get(domain)) for domain in outside]
        cells += [_loss(row.get("outside_mean")), _difference(row.get("outside_minus_start"))]
    return cells


def _own_forms(results: Mapping[str, Any]) -> Cells:
    headings = ["units chosen by", "seeds", "parameters", "after cutting", "- one size for all"]
    rows = [
        [
            row["title"],
            str(len(row["seeds"])),
            f"{row['parameters'][0]:,} of {row['target_parameters']:,}" if row["parameters"] else "–",
            _loss(row["after_cutting"]),
            _difference(row["minus_uniform"]),
        ]
        for row in results["own_forms"]
    ]
    return [headings, *rows]


def _rich(title: str, cells: Cells) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for index, heading in enumerate(cells[0]):
        # Words wrap, figures never do.
        table.add_column(escape(heading), justify="right" if index else "left", no_wrap=bool(index))
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    return table


def _markdown(cells: Cells) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(cells[0]) - 1), *lines[1:]])


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def plan_table(plan: RacePlan, *, done: int, flops: float, seconds: float | None) -> RenderableType:
    """What a race will run, before it does.

    Args:
        plan: of the race.
        done: rows that are there already.
        flops: that the others will take.
        seconds: what the others will take; None where nothing says how fast this machine is.
    """
    cells = [["contender", "steps", "choosing", "refit", "masks", "training", "FLOPs"]]
    seeds = {row.seed for row in plan.rows}
    for row in plan.rows:
        if row.seed == min(seeds):
            of_row = plan.flops[row]
            figures = (of_row.choosing, of_row.refit, of_row.masked, of_row.training, of_row.total)
            cells.append([row.contender.title, str(row.steps), *(f"{each:.2e}" if each else "–" for each in figures)])
    left = "how long it takes is known after the first row" if seconds is None else f"about {seconds / 3600:.1f} h left"
    said = (
        f"{len(plan.rows)} rows with {len(seeds)} seed(s), {done} of them there already; {flops:.2e} FLOPs left; {left}"
    )
    return Group(_rich("rows of each seed", cells), Text(said))


def tables_of(results: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each table, with its title."""
    for budget in results["budgets"]:
        for kind, title in _TITLES.items():
            if kind in budget:
                flops = f", {budget['flops']:.2e} FLOPs" if kind == "equal_flops" else ""
                yield f"{title}: {format_tokens(budget['tokens'])} tokens{flops}", budget[kind]


def _difference(paired: Mapping[str, Any] | None) -> str:
    if paired is None:
        return "–"
    if paired["spread"] is None:
        return f"{paired['mean']:+.3f}"
    return f"{paired['mean']:+.3f} ± {paired['spread']:.3f} [{paired['min']:+.3f}, {paired['max']:+.3f}]"


def _said(table: Mapping[str, Any]) -> Iterator[str]:
    if table.get("learned_minus_start") is not None:
        yield f"learned - start: {_difference(table['learned_minus_start'])}"
    if table.get("best_rival") is not None:
        yield f"learned - best rival ({table['best_rival']}): {_difference(table['learned_minus_best_rival'])}"
