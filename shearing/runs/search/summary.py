"""What a search has found so far: the figures of its candidates by round, who goes on, who has won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shearing.evaluation.layer_times import LayerTimes, Times
from shearing.runs.recipe import Recipe
from shearing.runs.search.candidates import DTYPES, Budget, Candidate, search_of
from shearing.runs.search.plan import SearchPlan
from shearing.runs.search.space import memory_of

Records = Mapping[tuple[Candidate, int], Mapping[str, Any]]
"""What candidates were worth, by candidate and number of the round."""


def loss_of(record: Mapping[str, Any] | None) -> float | None:
    """On validation text, the mean over domains; None where it is not there, or the run has failed."""
    return None if record is None or "failed" in record else float(record["validation"]["mean"])


def contenders(plan: SearchPlan, records: Records, *, number: int) -> list[Candidate] | None:
    """Who takes part in a round: the best of the round before; None as long as that is not over.

    Args:
        plan: of the search.
        records: so far.
        number: of the round, from 1.
    """
    if number == 1:
        return plan.candidates
    before = contenders(plan, records, number=number - 1)
    if before is None or any((candidate, number - 1) not in records for candidate in before):
        return None
    found = {candidate: loss_of(records[candidate, number - 1]) for candidate in before}
    ended = [candidate for candidate in before if found[candidate] is not None]
    ranked = sorted(ended, key=lambda candidate: found[candidate] or 0.0)
    return ranked[: plan.rounds[number - 1].candidates]


def winner_of(plan: SearchPlan, records: Records) -> Candidate | None:
    """The best of the last round; None as long as that is not over, or where everything failed."""
    last = len(plan.rounds)
    there = contenders(plan, records, number=last)
    if not there or any((candidate, last) not in records for candidate in there):
        return None
    found = {candidate: loss for candidate in there if (loss := loss_of(records[candidate, last])) is not None}
    return min(found, key=lambda candidate: found[candidate], default=None)


def summarise(
    recipe: Recipe,
    plan: SearchPlan,
    records: Records,
    *,
    budget: Budget | None,
    measured: Mapping[str, Times],
    layer_times: LayerTimes | None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        recipe: of the search.
        plan: of it.
        records: so far.
        budget: None where candidates were named.
        measured: times of candidates' shapes by name; may be empty.
        layer_times: the table that times were predicted from; None: there is none.

    Returns:
        `rounds`, `candidates` (the best first), `winner` (None until there is one), `winner_minus_target` (test loss
        after the last round, None unless the recipe's own target came that far), `tokens` of training so far, and
        `prediction_error` of times.
    """
    rounds = [
        {"candidates": each.candidates, "tokens": each.tokens, "steps": steps}
        for each, steps in zip(plan.rounds, plan.steps, strict=True)
    ]
    lines = [_line(recipe, plan, records, candidate) for candidate in plan.candidates]
    for line, candidate in zip(lines, plan.candidates, strict=True):
        if candidate.name in measured:
            line["measured_ms"] = vars(measured[candidate.name])
        if layer_times is not None:
            line["predicted_ms"] = vars(layer_times.of(candidate.shape))
    lines.sort(key=lambda line: (-len(line["rounds"]), line["rounds"][-1]["validation"] if line["rounds"] else 0.0))
    winner = winner_of(plan, records)
    return {
        "budget": None if budget is None else {"kind": budget.kind, "amount": budget.amount},
        "rounds": rounds,
        "candidates": lines,
        "winner": None if winner is None else winner.name,
        "winner_minus_target": _minus_target(plan, records, winner=winner),
        "tokens": sum(max((each["tokens"] for each in line["rounds"]), default=0) for line in lines),
        "flops": plan.flops(per_step=recipe.pretrain.tokens_per_step(sequence_length=recipe.data.sequence_length)),
        "prediction_error": _prediction_error(lines),
    }


def _line(recipe: Recipe, plan: SearchPlan, records: Records, candidate: Candidate) -> dict[str, Any]:
    search, shape = search_of(recipe), candidate.shape
    own = [records[candidate, number + 1] for number in range(len(plan.rounds)) if (candidate, number + 1) in records]
    failed = next((record["failed"] for record in own if "failed" in record), None)
    finished = [record for record in own if "failed" not in record]
    size = DTYPES[search.dtype].itemsize
    memory = memory_of(shape, batch_size=search.batch_size, context=search.context, bytes_per_value=size)
    return {
        **candidate.to_json(),
        "parameters": shape.num_parameters(),
        "bytes": memory,
        "failed": failed,
        "after_cutting": finished[0]["after_cutting"]["mean"] if finished else None,
        "rounds": [
            {
                "tokens": record["tokens"],
                "validation": record["validation"]["mean"],
                "domains": record["validation"]["domains"],
                **({"test": record["test"]} if "test" in record else {}),
                "seconds": record["seconds"],
            }
            for record in finished
        ],
    }


def _minus_target(plan: SearchPlan, records: Records, *, winner: Candidate | None) -> float | None:
    target = next((candidate for candidate in plan.candidates if candidate.is_target), None)
    last = len(plan.rounds)
    if winner is None or target is None or "test" not in records.get((target, last), {}):
        return None
    losses = [records[candidate, last]["test"]["mean"] for candidate in (winner, target)]
    return None if None in losses else losses[0] - losses[1]


def _prediction_error(lines: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean distance of predicted from measured times, as a share of these."""
    both = [line for line in lines if "measured_ms" in line and "predicted_ms" in line]
    if not both:
        return None
    return {
        kind: sum(abs(line["predicted_ms"][kind] / line["measured_ms"][kind] - 1) for line in both) / len(both)
        for kind in ("prompt", "next_token")
    }
