"""FLOPs by hand, and tables by numpy."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shearing.models.shape import Shape
from shearing.objectives.recipe import DistillRecipe
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.refitting.linear import refit_cost
from shearing.runs.race.flops import FlopCount, Flops, steps_within
from shearing.runs.race.methods import Contender
from shearing.runs.race.plan import Budget, RacePlan
from shearing.runs.race.records import RaceFolder, settings_of
from shearing.runs.race.results.summary import paired, summarise
from shearing.runs.race.results.tables import markdown_tables
from shearing.runs.race.rows import Row, Steps
from shearing.runs.recipe import Recipe, load_recipe
from tests.conftest import tiny_recipe_data
from tests.models.tiny import tiny_model
from tests.repository import RECIPES

START = Contender(method="start", refitted=True)
FROZEN = Contender(method="start", refitted=False)
LEARNED = Contender(method="learned", refitted=True)
RIVAL = Contender(method="random", refitted=False)


def _shape(*, layers: int, hidden: int, heads: int, units: int) -> Shape:
    return Shape(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=units,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=2,
        vocab_size=10,
        tied=True,
        family=Shape.of(tiny_model().config).family,
    )


SOURCE = _shape(layers=2, hidden=4, heads=2, units=8)
TARGET = _shape(layers=1, hidden=2, heads=1, units=4)


def test_flops_of_rows_by_hand() -> None:
    """Sequences of 4, 8 tokens a step, half of the steps before the cut."""
    data = tiny_recipe_data(Path("nowhere"), run_dir=Path("unused"))
    data["prune"]["initial_masks"] = "random"
    count = FlopCount(
        source=SOURCE,
        target=TARGET,
        sequence_length=4,
        evidence=Evidence(),
        steps=Steps(tokens_per_step=8, mask_share=Fraction(1, 2)),
        recipes=dict.fromkeys((FROZEN, RIVAL), Recipe.model_validate(data)),
    )
    # Attention 4 d H dh, MLP 3 d m, two norms a layer and one in the end, an embedding of 10 d that is the head.
    source, target = 2 * (4 * 16 + 3 * 32 + 8) + 4 + 40, (4 * 4 + 3 * 8 + 4) + 2 + 20
    assert (source, target) == (SOURCE.num_parameters(), TARGET.num_parameters())
    # Scores and values: 2 products of 2 FLOPs a channel for the S / 2 = 2 positions that a token sees on average.
    forward_source, forward_target = 2 * source + 2 * (2 * 2 * 4 * 2), 2 * target + 1 * (2 * 2 * 2 * 2)
    ranked = count.of(RIVAL, steps=6)
    assert ranked.choosing == ranked.refit == ranked.masked == 0
    assert ranked.training == ranked.total == 3 * forward_target * 8 * 6
    frozen = count.of(FROZEN, steps=6)
    assert frozen.masked == 3 * forward_source * 8 * 3
    assert frozen.training == 3 * forward_target * 8 * 3
    assert frozen.total == frozen.masked + frozen.training
    taught = replace(count, teacher_per_token=7.0).of(FROZEN, steps=6)
    assert (taught.masked - frozen.masked, taught.training - frozen.training) == (7 * 8 * 3, 7 * 8 * 3)


def test_flops_of_the_refit_by_hand() -> None:
    cost = refit_cost(SOURCE, target=TARGET, text_tokens=10)
    systems = [(2, 4), (2, 2), (2, 4), (4, 2)]  # inputs that take part, outputs
    sums = sum(2 * 10 * n * (n + outputs) for n, outputs in systems)
    solutions = sum(n**3 / 3 + 2 * n**2 * outputs for n, outputs in systems)
    assert cost.forward_tokens == 20
    assert cost.other_flops == pytest.approx(sums + solutions)


def test_what_rows_share_is_left_once(tmp_path: Path) -> None:
    rows = [Row(contender=RIVAL, seed=seed, steps=steps) for seed in (0, 1) for steps in (5, 10)]
    rows += [Row(contender=START, seed=0, steps=10)]
    plan = replace(
        _plan(dict.fromkeys(rows), contenders=[RIVAL, START]),
        flops={
            row: Flops(choosing=100, refit=10, masked=1 if row.contender == START else 0, training=2) for row in rows
        },
        choosing={contender: {"random": 100.0} for contender in (RIVAL, START)},
    )
    folder = RaceFolder(path=tmp_path)
    # Two seeds of scores, two cuts and the start's own refit, the steps of all.
    assert plan.left(rows, folder=folder) == 2 * 100 + 3 * 10 + 5 * 2 + 1
    folder.scores("random", seed=0).parent.mkdir()
    folder.scores("random", seed=0).touch()
    assert plan.left(rows, folder=folder) == 100 + 3 * 10 + 5 * 2 + 1


@pytest.mark.parametrize(("fixed", "budget", "steps"), [(0, 100, 10), (5, 100, 9), (0, 99, 9), (90, 100, None)])
def test_steps_within_a_budget(fixed: float, budget: float, steps: int | None) -> None:
    assert steps_within(budget, cost=lambda number: fixed + 10.0 * number, least=2) == steps


def _standard_error(gains: np.ndarray[Any, Any]) -> float:
    return float(gains.std(ddof=1) / math.sqrt(len(gains)))


def test_paired_differences_are_numpys() -> None:
    ours, theirs = {0: 4.1, 1: 4.3, 2: 3.9}, {0: 4.0, 2: 4.2, 1: 4.25, 7: 1.0}
    gains = np.array([0.1, 0.05, -0.3])
    found = paired(ours, theirs)
    assert found is not None
    assert found["mean"] == pytest.approx(gains.mean(), abs=1e-5)
    assert found["spread"] == pytest.approx(_standard_error(gains), abs=1e-5)
    assert (found["min"], found["max"]) == (pytest.approx(-0.3), pytest.approx(0.1))
    assert found["seeds"] == [0, 1, 2]
    assert paired(ours, {5: 1.0}) is None
    alone = paired(ours, {0: 4.0})
    assert alone is not None
    assert alone["spread"] is None


def _record(mean: float, *, changed: Any = None) -> dict[str, Any]:
    return {
        "tokens": 320,
        "units": "0123456789abcdef",
        "changed_from_start": changed,
        "flops": {"total": 1e9},
        "losses": {
            "after_cutting": {"mean": mean + 1},
            "final": {"mean": mean, "domains": {"a": mean - 1, "b": mean + 1}},
        },
        "seconds": {"training": 2.0},
    }


def _plan(records: dict[Row, Any], *, contenders: list[Contender]) -> RacePlan:
    return RacePlan(
        budgets=[Budget(tokens=330, steps=10, flops=None, steps_within={})],
        contenders=contenders,
        own_forms=[],
        rows=list(records),
        recipes={},
        flops={},
        choosing={},
        steps=Steps(tokens_per_step=32, mask_share=Fraction(1, 2)),
        source=SOURCE,
        target=TARGET,
    )


def test_tables_say_differences_and_the_best_rival() -> None:
    losses = {LEARNED: [4.0, 4.4, 4.1], START: [4.1, 4.3, 4.2], RIVAL: [4.2, 4.2, 4.0]}
    records = {
        Row(contender=contender, seed=seed, steps=10): _record(mean, changed={"layers": seed})
        for contender, means in losses.items()
        for seed, mean in enumerate(means)
    }
    results = summarise(_plan(records, contenders=list(losses)), equal=["tokens"], records=records)
    (budget,) = results["budgets"]
    assert budget["tokens"] == 320
    table = budget["equal_tokens"]
    to_start, to_rival = (np.array(losses[LEARNED]) - np.array(losses[other]) for other in (START, RIVAL))
    assert table["best_rival"] == "random"
    assert {row["validation"] for row in table["rows"]} == {None}
    for name, gains in (("learned_minus_start", to_start), ("learned_minus_best_rival", to_rival)):
        assert table[name]["mean"] == pytest.approx(gains.mean(), abs=1e-5)
        assert table[name]["spread"] == pytest.approx(_standard_error(gains), abs=1e-5)
    assert table["changed_from_start"] == {0: {"layers": 0}, 1: {"layers": 1}, 2: {"layers": 2}}
    rival = table["rows"][2]
    assert rival["mean"] == pytest.approx(np.mean(losses[RIVAL]), abs=1e-5)
    assert rival["domains"] == pytest.approx({"a": rival["mean"] - 1, "b": rival["mean"] + 1}, abs=1e-5)
    text = markdown_tables(results)
    assert "**" not in text
    assert "| learned masks, refitted (0 to 2 units changed) | 3 |" in text
    assert f"{to_start.mean():+.3f} ± {_standard_error(to_start):.3f} [-0.100, +0.100]" in text


def test_text_of_no_domain_has_a_mean_of_its_own() -> None:
    records = {}
    for contender, mean in ((LEARNED, 4.0), (START, 4.5)):
        records[Row(contender=contender, seed=0, steps=10)] = record = _record(4.0)
        record["losses"]["final"] |= {"outside_mean": mean, "outside": {"plays": mean - 0.5, "code": mean + 0.5}}
    results = summarise(_plan(records, contenders=[LEARNED, START]), equal=["tokens"], records=records)
    table = results["budgets"][0]["equal_tokens"]
    assert table["learned_minus_start"]["mean"] == 0
    assert table["learned_minus_start_outside"]["mean"] == table["learned_minus_best_rival_outside"]["mean"] == -0.5
    assert table["rows"][0]["outside"] == {"plays": 3.5, "code": 4.5}
    lines = markdown_tables(results).splitlines()
    assert "| units chosen by | a | b | plays | code | outside | - start |" in lines
    assert "| learned masks, refitted | 3.000 | 5.000 | 3.500 | 4.500 | 4.000 | -0.500 |" in lines


def test_a_rival_that_failed_a_seed_is_not_the_best() -> None:
    records: dict[Row, dict[str, Any]] = {
        Row(contender=contender, seed=seed, steps=10): _record(mean)
        for contender, mean in ((LEARNED, 4.0), (START, 4.1), (RIVAL, 1.0))
        for seed in (0, 1)
    }
    records[Row(contender=RIVAL, seed=1, steps=10)] = {"failed": "NaN"}
    results = summarise(_plan(records, contenders=[LEARNED, START, RIVAL]), equal=["tokens"], records=records)
    assert results["budgets"][0]["equal_tokens"]["best_rival"] == "start-refitted"
    assert "1 (1 failed)" in markdown_tables(results)


def test_a_key_at_its_default_is_no_part_of_a_race() -> None:
    """So that keys of later releases do not make another race of it; a section that is there is said."""
    common = {"model": "m", "corpus": "c", "outside": None, "split": "test", "precision": "float32"}
    recipe = load_recipe(RECIPES / "race-135m.yaml")
    given = settings_of(recipe, **common)
    assert given["pretrain.learning_rate"] == 3e-4
    assert given["prune"] == given["target"] == "given"
    assert not given.keys() & {"prune.temperature", "prune.estimator", "mixture.step_size", "distill", "data.corpus"}
    distilled = settings_of(recipe.model_copy(update={"distill": DistillRecipe()}), **common)
    assert distilled == {**given, "distill": "given"}
