"""What the rows of `one_shot.py` say: the table of a pattern, the best, and which published orderings hold.

    python benchmarks/one_shot_rows.py runs/one-shot

prints both of the rows that are in a folder, however few; nothing is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearing.files.durable import read_json
from shearing.pruning.sparse.criteria.facts import CRITERIA
from shearing.pruning.sparse.reconstruction.facts import RECONSTRUCTIONS
from shearing.runs.race.results.summary import paired

PATTERNS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "62.5% of N:8": {"sparsity": 0.625, "levels": [f"{kept}:8" for kept in range(1, 9)]},
}
SHARED_OUT = "62.5% of N:8"
DENSE = "dense"


@dataclass(frozen=True)
class Cell:
    """One sparse model.

    Attributes:
        criterion, reconstruction, allocation: as recipes say them; `dense` is the model as it is.
        pattern: a name in `PATTERNS`.
        seed: draws the calibration text.
    """

    criterion: str
    reconstruction: str
    pattern: str
    seed: int = 0
    allocation: str = "uniform"

    @property
    def method(self) -> str:
        """What tables call it."""
        if self.criterion == DENSE:
            return DENSE
        shared = [] if self.allocation == "uniform" else [self.allocation]
        return " + ".join([self.criterion, *shared, *([] if self.reconstruction == "none" else [self.reconstruction])])


@dataclass(frozen=True)
class Ordering:
    """Two methods of which one was published to be better at a pattern.

    Attributes:
        better, worse: criterion and reconstruction.
        patterns: where.
        source: of the claim.
    """

    better: tuple[str, str]
    worse: tuple[str, str]
    patterns: tuple[str, ...]
    source: str


WANDA, SPARSEGPT = ("wanda", "none"), ("sparsegpt", "obs")
# Weights compete as in the codes released with a method (recipe key `group`, unset). DSnoT refines every matrix here;
# its code leaves those of MLPs as they are unless told otherwise.
ORDERINGS = (
    Ordering(WANDA, ("magnitude", "none"), ("50%", "2:4", "4:8"), "2306.11695"),
    Ordering(SPARSEGPT, WANDA, ("2:4",), "2306.11695"),
    Ordering(WANDA, SPARSEGPT, ("50%",), "2306.11695, Llama-2"),
    Ordering(("wanda", "dsnot"), WANDA, ("60%",), "2310.08915"),
    Ordering(("magnitude", "dsnot"), ("magnitude", "none"), ("60%",), "2310.08915"),
    Ordering(("wanda", "admm_gradual"), SPARSEGPT, ("50%", "2:4"), "2401.02938"),
    Ordering(("ria", "none"), WANDA, ("50%", "2:4"), "RIA, Llama-3-8B"),
    Ordering(("gblm", "none"), WANDA, ("50%", "2:4"), "2311.04902"),
    Ordering(("isc", "obs"), SPARSEGPT, ("50%",), "2310.09499"),
    Ordering(("sparsegpt", "closed_form"), SPARSEGPT, ("50%", "2:4"), "2410.15567"),
    Ordering(("wanda", "alps"), SPARSEGPT, ("60%", "2:4"), "2406.07831"),
)


Rows = Mapping[Cell, Mapping[str, Any]]
"""What was measured of each: losses by domain, seconds and memory."""


def mean_of(losses: Mapping[str, float]) -> float:
    """Over domains."""
    return statistics.mean(losses.values())


# Two-sided 95 % of Student's t, by degrees of freedom: of six domains twice the error is not enough.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def held(difference: float, *, error: float, domains: int) -> str:
    """Whether what was published to be better is: yes and no are further from 0 than chance is in 5 of 100 tries.

    Args:
        difference: mean over domains, nats.
        error: standard error of it.
        domains: that the error is over.
    """
    if domains < 2 or abs(difference) < T95[min(domains - 1, len(T95)) - 1] * error:
        return "undecided"
    return "yes" if difference < 0 else "no"


def _error_over_domains(better: Mapping[int, Mapping[str, float]], worse: Mapping[int, Mapping[str, float]]) -> float:
    """Standard error over domains of the difference, mean over the draws that both have: what other text would say."""
    draws = better.keys() & worse.keys()
    by_domain = [
        statistics.mean(better[draw][domain] - worse[draw][domain] for draw in draws) for domain in better[min(draws)]
    ]
    return statistics.stdev(by_domain) / len(by_domain) ** 0.5 if len(by_domain) > 1 else 0.0


def _by_draw(rows: Rows, method: tuple[str, str], pattern: str, text: str) -> dict[int, Mapping[str, float]]:
    """Losses of a method by domain, by draw of the calibration text."""
    return {
        cell.seed: row[text]
        for cell, row in rows.items()
        if (cell.criterion, cell.reconstruction) == method and (cell.pattern, cell.allocation) == (pattern, "uniform")
    }


def compared(rows: Rows, *, better: tuple[str, str], worse: tuple[str, str], pattern: str, text: str) -> Any:
    """`difference` of two methods (`paired`), its `error` over draws and domains, and whether it `holds`.

    Args:
        text: `losses` (test text of the domains) or `outside` (of others).

    Returns:
        None where a row is missing.
    """
    ours, theirs = (_by_draw(rows, method, pattern, text) for method in (better, worse))
    difference = paired(*({seed: mean_of(losses) for seed, losses in of.items() if losses} for of in (ours, theirs)))
    if difference is None:
        return None
    error = math.hypot(difference["spread"] or 0.0, _error_over_domains(ours, theirs))
    holds = held(difference["mean"], error=error, domains=len(ours[min(ours)]))
    return {"holds": holds, "difference": difference, "error": round(error, 4)}


def orderings(rows: Rows) -> list[dict[str, Any]]:
    """Of each published ordering and pattern: whether test text and other text agree, and the difference in nats."""
    found = []
    for ordering in ORDERINGS:
        sides = {"better": ordering.better, "worse": ordering.worse}
        for pattern in ordering.patterns:
            inside, outside = (compared(rows, **sides, pattern=pattern, text=text) for text in ("losses", "outside"))
            if inside is not None:
                names = {side: " + ".join(method) for side, method in sides.items()}
                found.append({**names, "pattern": pattern, "source": ordering.source, **inside, "outside": outside})
    return found


def markdown_of_orderings(found: Sequence[Mapping[str, Any]]) -> str:
    """A line for each ordering at each pattern."""

    def cell(of: Mapping[str, Any] | None) -> str:
        return "" if of is None else f"{of['holds']}: {of['difference']['mean']:+.3f} ± {of['error']:.3f}"

    lines = [["better", "worse", "pattern", "six domains", "other text"], ["---", "---", "---", "---:", "---:"]]
    for each in found:
        names = (each[side].removesuffix(" + none") for side in ("better", "worse"))
        lines.append([*names, each["pattern"].replace("%", " %"), cell(each), cell(each["outside"])])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def best_of(rows: Rows) -> dict[str, dict[str, Any]]:
    """Of each pattern the method of lowest validation loss in the first draw, and what test text says of it."""
    best = {}
    for pattern in PATTERNS:
        of_pattern = [cell for cell in rows if (cell.pattern, cell.seed, cell.allocation) == (pattern, 0, "uniform")]
        if of_pattern and pattern != SHARED_OUT:
            first = min(of_pattern, key=lambda cell: mean_of(rows[cell]["validation"]))
            row = rows[first]
            best[pattern] = {
                "method": first.method,
                "validation": round(mean_of(row["validation"]), 4),
                "test": round(mean_of(row["losses"]), 4),
                "outside": round(mean_of(row["outside"]), 4) if row["outside"] else None,
            }
    return best


def shared_out(rows: Rows) -> dict[str, float]:
    """Mean test loss over draws by allocation."""
    losses: dict[str, list[float]] = {}
    for cell, row in rows.items():
        losses.setdefault(cell.allocation, []).append(mean_of(row["losses"]))
    return {name: round(statistics.mean(each), 4) for name, each in losses.items()}


def markdown_of(rows: Rows, *, pattern: str) -> str:
    """Criterion x reconstruction of the first draw: loss of test text and of other domains; seconds and memory."""
    cells = {(c.criterion, c.reconstruction): row for c, row in rows.items() if (c.pattern, c.seed) == (pattern, 0)}
    ways = [way for way in RECONSTRUCTIONS if any(key[1] == way for key in cells)]
    best = min(cells, key=lambda key: mean_of(cells[key]["validation"]), default=None)

    def cell(criterion: str, way: str) -> str:
        if (criterion, way) not in cells:
            return "–"
        row = cells[criterion, way]
        text = f"{mean_of(row['losses']):.3f}" + (f" / {mean_of(row['outside']):.3f}" if row["outside"] else "")
        return f"**{text}**" if (criterion, way) == best else text

    def last(name: str, figure: Callable[[Mapping[str, Any]], float]) -> list[str]:
        of_ways = [[figure(row) for key, row in cells.items() if key[1] == way] for way in ways]
        return [name, *(f"{statistics.median(each):,.0f}" for each in of_ways)]

    lines = [[pattern.replace("%", " %"), *ways], ["---", *["---:"] * len(ways)]]
    lines += [[name, *(cell(name, way) for way in ways)] for name in CRITERIA if any(key[0] == name for key in cells)]
    lines.append(last("seconds", lambda row: row["seconds"]))
    lines.append(last("of them pruning itself", lambda row: row["metric_seconds"]))
    lines.append(last("peak MB above start", lambda row: row["peak_memory_above_start"] / 1e6))
    return _markdown(lines)


def rows_in(folder: Path) -> dict[Cell, dict[str, Any]]:
    """The rows that are there."""
    found = [read_json(path) for path in sorted(folder.glob("*/*.json"))]
    return {Cell(**{name: row[name] for name in Cell.__dataclass_fields__}): row for row in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    rows = rows_in(parser.parse_args().folder)
    grid = {cell: row for cell, row in rows.items() if cell.criterion != DENSE and cell.allocation == "uniform"}
    for pattern in dict.fromkeys(cell.pattern for cell in grid):
        print(markdown_of(grid, pattern=pattern))
    print(markdown_of_orderings(orderings(grid)))


if __name__ == "__main__":
    main()
