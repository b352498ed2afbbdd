"""Which units the others can stand in for."""

from __future__ import annotations

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.reconstruction import DAMPING, Reconstruction, elimination_order
from tests.models.declared import declared_families
from tests.models.tiny import tiny_ids, tiny_model

BATCHES = [Inputs(tiny_ids(sequences=8, seed=seed)) for seed in range(8)]


def refit_error(weight: torch.Tensor, moment: torch.Tensor, gone: list[int]) -> float:
    """Mean square of what the output lacks after the best refit without the columns `gone`, by its definition."""
    kept = [column for column in range(weight.shape[1]) if column not in gone]
    refit = torch.linalg.lstsq(moment[kept][:, kept], moment[kept] @ weight.T).solution.T
    lacks = weight.clone()
    lacks[:, kept] -= refit
    return float(torch.einsum("oi,ij,oj->", lacks, moment, lacks))


def damped_moment(x: torch.Tensor) -> torch.Tensor:
    moment = x.T @ x / len(x)
    return moment + torch.diag(DAMPING * moment.diagonal())


@pytest.mark.parametrize(("rows", "units"), [(1, 12), (1, 4), (2, 3), (3, 4)])
def test_the_elimination_order_is_the_greedy_one_by_explicit_refits(rows: int, units: int):
    generator = torch.Generator().manual_seed(rows * 10 + units)
    width = 12 // (rows * units)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(500, 12, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    moment = x.T @ x / len(x)
    scores = elimination_order(weight, moment, rows=rows, units=units, remove=units - 1)

    damped, gone = damped_moment(x), []
    expected = torch.full((rows, units), float(units - 1))
    for order in range(units - 1):
        owing = set(range(rows))
        while owing:
            options = {}
            for row in owing:
                for unit in range(units):
                    if expected[row, unit] == units - 1:
                        first = (row * units + unit) * width
                        columns = [*gone, *range(first, first + width)]
                        options[row, unit] = refit_error(weight, damped, columns)
            row, unit = min(options, key=options.__getitem__)
            expected[row, unit] = order
            first = (row * units + unit) * width
            gone += range(first, first + width)
            owing.remove(row)
    assert torch.equal(scores, expected)


def test_removing_several_at_once_takes_the_cheapest_and_keeps_the_rest_in_order():
    moment = torch.diag(torch.arange(1.0, 17.0))
    scores = elimination_order(torch.ones(3, 16), moment, rows=1, units=16, remove=9, at_once=4)
    assert scores[0].argsort().tolist() == list(range(16))


def test_of_two_units_that_say_the_same_one_goes_first_and_the_other_stays_to_the_end():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 3 * x[:, 2]
    scores = elimination_order(torch.ones(4, 8), x.T @ x / 500, rows=1, units=8, remove=7)
    assert {int(scores.argmin()), int(scores.argmax())} == {2, 5}


def test_it_ranks_heads_groups_and_units_and_leaves_the_rest_to_activations():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[7] = 0.0
            layer.self_attn.v_proj.weight[: Shape.of(model.config).head_dim] = 0.0
    scores = Reconstruction().scores(model, evidence=Evidence(text=BATCHES))
    by_activations = Activations().scores(model, evidence=Evidence(text=BATCHES))
    assert (scores["intermediate"].argmin(-1) == 7).all()
    assert (scores["kv_groups"].argmin(-1) == 0).all()
    assert {name: score.shape for name, score in scores.items()} == {n: s.shape for n, s in by_activations.items()}
    for name in ("layers", "attention", "mlp", "hidden"):
        torch.testing.assert_close(scores[name], by_activations[name])


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_a_family_with_norms_after_its_writes_is_refused_before_any_work(family: str):
    with declared_families():
        model, evidence = tiny_model(family), Evidence(text=BATCHES)
        with pytest.raises(ShearingError, match="another initial_masks"):
            Reconstruction().units_of_work(Shape.of(model.config), evidence=evidence)
        advanced: list[int] = []
        with pytest.raises(ShearingError) as refused:
            Reconstruction().scores(model, evidence=evidence, advance=advanced.append)
        assert refused.value.value == family
        assert not advanced
