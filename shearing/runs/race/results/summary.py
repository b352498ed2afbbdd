"""The figures of a race: means over seeds, and differences between rows of the same seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shearing.runs.race.methods import LEARNED, Contender
from shearing.runs.race.plan import Budget, RacePlan
from shearing.runs.race.records import Record
from shearing.runs.race.rows import Row, baseline_of


@dataclass(frozen=True, kw_only=True)
class Line:
    """A contender in one table.

    Attributes:
        contender: who.
        records: by seed; those that failed have `failed`.
        steps: of each row; None where the budget does not even pay for choosing.
    """

    contender: Contender
    records: Mapping[int, Record]
    steps: int | None

    @property
    def finished(self) -> dict[int, Record]:
        """The records of rows that have not failed, by seed."""
        return {seed: record for seed, record in self.records.items() if "failed" not in record}

    def losses(self, mean: str = "mean") -> dict[int, float]:
        """Mean loss in the end by seed: over domains, or with `outside_mean` over text of none, where there is some."""
        finals = {seed: record["losses"]["final"] for seed, record in self.finished.items()}
        return {seed: final[mean] for seed, final in finals.items() if final.get(mean) is not None}


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """Differences ours - theirs of the seeds that both have; None if there are none.

    Returns:
        `mean`; `spread`: the standard error of the mean, s / sqrt(n), None with one seed; `min` and `max`; `seeds`.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    gains = [ours[seed] - theirs[seed] for seed in seeds]
    return {
        "mean": round(statistics.mean(gains), 5),
        "spread": None if len(gains) < 2 else round(statistics.stdev(gains) / math.sqrt(len(gains)), 5),
        "min": round(min(gains), 5),
        "max": round(max(gains), 5),
        "seeds": seeds,
    }


def lines_of(plan: RacePlan, *, budget: Budget, equal: str, records: Mapping[Row, Record]) -> list[Line]:
    """The lines of the table of a budget, in the order of the contenders.

    Args:
        plan: of the race.
        budget: one of its budgets.
        equal: `tokens` or `flops`.
        records: of the rows that have ended so far.
    """
    lines = []
    seeds = sorted({row.seed for row in plan.rows})
    for contender in plan.contenders:
        steps = budget.steps if equal == "tokens" else budget.steps_within[contender]
        rows = [] if steps is None else [Row(contender=contender, seed=seed, steps=steps) for seed in seeds]
        found = {row.seed: records[row] for row in rows if row in records}
        lines.append(Line(contender=contender, records=found, steps=steps))
    return lines


def summarise(plan: RacePlan, *, equal: Sequence[str], records: Mapping[Row, Record]) -> dict[str, Any]:
    """All tables of a race as values.

    Args:
        plan: of the race.
        equal: which tables.
        records: of the rows that have ended so far.

    Returns:
        `budgets`: for each `tokens`, `steps`, `flops` and, by `equal_tokens` and `equal_flops`, `rows` and the verdict:
        `best_rival`, `learned_minus_start`, `learned_minus_best_rival` and the `changed_from_start` of each seed.
        `own_forms`: methods with sizes by layer, which are not trained.
    """
    budgets = []
    for budget in plan.budgets:
        tables = {
            f"equal_{kind}": table_of(lines_of(plan, budget=budget, equal=kind, records=records)) for kind in equal
        }
        budgets.append(
            {
                "tokens": budget.steps * plan.steps.tokens_per_step,
                "steps": budget.steps,
                "flops": budget.flops,
                **tables,
            }
        )
    own_forms = [_own_form(contender, plan=plan, records=records) for contender in plan.own_forms]
    return {"budgets": budgets, "own_forms": own_forms}


def table_of(lines: Sequence[Line]) -> dict[str, Any]:
    """Rows of a table and what they say of learning; see `summarise`."""
    by_contender = {line.contender: line for line in lines if line.finished}
    baseline = baseline_of(list(by_contender))
    start = None if baseline is None else by_contender[baseline]
    return {"rows": [_row(line, start=start) for line in lines], **_verdict(by_contender, start=start)}


def _row(line: Line, *, start: Line | None) -> dict[str, Any]:
    finished = list(line.finished.values())
    row: dict[str, Any] = {
        "name": line.contender.name,
        "method": line.contender.method,
        "title": line.contender.title,
        "steps": line.steps,
        "seeds": sorted(line.finished),
        "failed": {seed: record["failed"] for seed, record in line.records.items() if "failed" in record},
    }
    if not finished:
        return row
    finals = [record["losses"]["final"] for record in finished]
    after = [record["losses"]["after_cutting"]["mean"] for record in finished]
    losses = list(line.losses().values())
    return {
        **row,
        "tokens": finished[0]["tokens"],
        "flops": statistics.mean(record["flops"]["total"] for record in finished),
        "units": [record["units"] for record in finished],
        "units_changed": [_changed(record) for record in finished],
        "after_cutting": None if None in after else round(statistics.mean(after), 5),
        "mean": round(statistics.mean(losses), 5),
        "standard_deviation": None if len(losses) < 2 else round(statistics.stdev(losses), 5),
        "domains": _means([final["domains"] for final in finals]),
        "validation": _validation(finished),
        "minus_start": _minus(line, start),
        **_outside(line, start=start),
        "seconds": round(statistics.mean(sum(record["seconds"].values()) for record in finished), 1),
    }


def _validation(finished: Sequence[Record]) -> float | None:
    """Mean of what may choose who goes on, over all seeds; None where a row has none, as earlier ones."""
    losses = [record["losses"].get("validation", {}).get("mean") for record in finished]
    return None if None in losses else round(statistics.mean(losses), 5)


def _outside(line: Line, *, start: Line | None) -> dict[str, Any]:
    """Of text of no training domain, where all rows have read some."""
    losses = line.losses("outside_mean")
    if len(losses) < len(line.finished):
        return {}
    return {
        "outside": _means([record["losses"]["final"]["outside"] for record in line.finished.values()]),
        "outside_mean": round(statistics.mean(losses.values()), 5),
        "outside_minus_start": _minus(line, start, mean="outside_mean"),
    }


def _minus(line: Line, other: Line | None, *, mean: str = "mean") -> dict[str, Any] | None:
    return None if other is None else paired(line.losses(mean), other.losses(mean))


def _means(of_seeds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {domain: round(statistics.mean(losses[domain] for losses in of_seeds), 5) for domain in of_seeds[0]}


def _own_form(contender: Contender, *, plan: RacePlan, records: Mapping[Row, Record]) -> dict[str, Any]:
    """Sizes by layer against the target's, both right after the cut."""
    own, uniform = dict[int, float](), dict[int, float]()
    parameters = []
    for row, record in records.items():
        after = record["losses"]["after_cutting"]["mean"] if "losses" in record else None
        if after is None:
            continue
        if row.contender == contender:
            own[row.seed] = after
            parameters.append(record["parameters"])
        elif row.contender == replace(contender, own_sizes=False):
            uniform[row.seed] = after
    return {
        "name": contender.name,
        "title": contender.title,
        "seeds": sorted(own),
        "parameters": parameters,
        "target_parameters": plan.target.num_parameters(),
        "after_cutting": round(statistics.mean(own.values()), 5) if own else None,
        "minus_uniform": paired(own, uniform),
    }


def _changed(record: Record) -> int | None:
    """Units that learning put in another's place; None where nothing was learned, or from a start that chose none."""
    counts = (record["changed_from_start"] or {}).values()
    return sum(counts) if counts and all(isinstance(count, int) for count in counts) else None


def _verdict(lines: Mapping[Contender, Line], *, start: Line | None) -> dict[str, Any]:
    learned = [contender for contender in lines if contender.method == LEARNED]
    if not learned:
        return {}
    ours = lines[max(learned, key=lambda contender: contender.refitted)]
    verdict: dict[str, Any] = {
        "learned_minus_start": _minus(ours, start),
        "changed_from_start": {seed: record["changed_from_start"] for seed, record in ours.finished.items()},
    }
    # Rivals of fewer seeds had easier or harder ones.
    seeds = ours.losses().keys()
    rivals = [line for line in lines.values() if line.contender.method != LEARNED and line.losses().keys() >= seeds]
    if rivals:
        best = min(rivals, key=lambda line: statistics.mean(line.losses()[seed] for seed in seeds))
        verdict["best_rival"] = best.contender.name
        verdict["learned_minus_best_rival"] = _minus(ours, best)
    outside = {
        "learned_minus_start_outside": _minus(ours, start, mean="outside_mean"),
        "learned_minus_best_rival_outside": _minus(ours, best, mean="outside_mean") if rivals else None,
    }
    return {**verdict, **{name: difference for name, difference in outside.items() if difference is not None}}
