"""The plan and the results of a search, for a terminal and as markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shearing.runs.recipe import Recipe
from shearing.runs.search.plan import SearchPlan
from shearing.settings.quantities import format_parameters, format_tokens

NOTE = (
    "Loss in nats per token, means over domains: on validation text, which chooses, right after cutting and after each "
    "round; on test text, which judges, after the last."
)
Cells = list[list[str]]


def plan_table(
    plan: SearchPlan, *, recipe: Recipe, flops_per_second: float | None = None, left: float | None = None
) -> RenderableType:
    """What a search will run.

    Args:
        plan: of it.
        recipe: of it.
        flops_per_second: of all devices together; None: not known.
        left: seconds that are left, from the pace so far; None: not known.
    """
    per_step = recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)
    shapes: Cells = [["candidate", "parameters", "layers", "hidden", "MLP", "heads", "KV", "FLOPs a token"]]
    for candidate, per_token in plan.per_token.items():
        shape = candidate.shape
        sizes = (shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size)
        heads = (shape.num_attention_heads, shape.num_key_value_heads)
        own = f"{candidate.name} (target)" if candidate.is_target else candidate.name
        shapes.append([own, f"{shape.num_parameters():,}", *map(str, (*sizes, *heads))])
        shapes[-1].append(f"{per_token + plan.teacher_per_token:.2e}")
    rounds: Cells = [["round", "candidates", "tokens of each, in all", "steps", "tokens of the round"]]
    before = 0
    for number, (each, steps) in enumerate(zip(plan.rounds, plan.steps, strict=True), start=1):
        tokens = each.candidates * (steps - before) * per_step
        rounds.append([str(number), str(each.candidates), f"{steps * per_step:,}", f"{steps:,}", f"{tokens:,}"])
        before = steps
    flops = plan.flops(per_step=per_step)
    said = f"{plan.tokens(per_step=per_step):,} tokens and {flops:.2e} FLOPs in all, without measuring losses"
    if left is not None:
        said += f"; about {left / 3600:.1f} h left"
    elif flops_per_second is not None:
        said += f"; {flops / flops_per_second / 3600:,.2g} h"
    return Group(_rich("candidates", shapes), _rich("rounds", rounds), Text(said))


def rich_tables(results: Mapping[str, Any]) -> RenderableType:
    """The results, for a terminal."""
    return Group(_rich("shapes, the best first", _cells(results)), *map(Text, _said(results)), Text(NOTE, style="dim"))


def markdown_tables(results: Mapping[str, Any]) -> str:
    """The results, as GitHub markdown."""
    cells = _cells(results)
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    table = "\n".join([rows[0], "|---|" + "---:|" * (len(cells[0]) - 1), *rows[1:]])
    said = "\n".join(f"- {line}" for line in _said(results))
    return f"{table}\n\n{said}\n\n{NOTE}\n"


def _cells(results: Mapping[str, Any]) -> Cells:
    timed = any("measured_ms" in line for line in results["candidates"])
    headings = ["shape", "parameters", "bytes", *(["prompt, ms", "next token, ms"] if timed else []), "cut"]
    headings += [format_tokens(each["tokens"]) for each in results["rounds"]]
    headings += ["test"]
    return [headings, *(_row(line, timed=timed, rounds=len(results["rounds"])) for line in results["candidates"])]


def _row(line: Mapping[str, Any], *, timed: bool, rounds: int) -> list[str]:
    own = f"{line['name']} (target)" if line["is_target"] else str(line["name"])
    name = own if line["failed"] is None else f"{own} (failed: {line['failed']})"
    cells = [name, format_parameters(line["parameters"]), f"{line['bytes'] / 1e6:,.0f} MB"]
    if timed:
        found = line.get("measured_ms")
        cells += ["–", "–"] if found is None else [f"{found['prompt']:.1f}", f"{found['next_token']:.2f}"]
    losses = [each["validation"] for each in line["rounds"]]
    test = line["rounds"][-1].get("test", {}).get("mean") if line["rounds"] else None
    return [*cells, *map(_loss, [line["after_cutting"], *losses, *[None] * (rounds - len(losses)), test])]


def _said(results: Mapping[str, Any]) -> list[str]:
    said = [f"{format_tokens(results['tokens'])} tokens of training in all"]
    if results["winner"] is not None:
        said.append(f"best: {results['winner']}")
    if results["winner_minus_target"] is not None:
        said.append(f"test loss, best - target of the recipe: {results['winner_minus_target']:+.3f}")
    if results["prediction_error"] is not None:
        error = results["prediction_error"]
        said.append(
            f"times predicted from the table of layers are off by {error['prompt']:.1%} (prompt) and "
            f"{error['next_token']:.1%} (next token) in the mean"
        )
    return said


def _rich(title: str, cells: Cells) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1), title_justify="left")
    for index, heading in enumerate(cells[0]):
        # Names wrap, figures never do.
        least = 0 if index else min(16, max(len(row[0]) for row in cells))
        table.add_column(
            escape(heading),
            justify="right" if index else "left",
            no_wrap=bool(index),
            overflow="fold",
            min_width=least,
        )
    for row in cells[1:]:
        table.add_row(*map(escape, row))
    return table


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
