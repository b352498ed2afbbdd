"""Which units the others can stand in for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.reconstruction import DAMPING, Reconstruction, elimination_order
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


def test_more_columns_than_a_block_of_updates_go_in_the_greedy_order():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(800, 160, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(160, 160, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 160, generator=generator, dtype=torch.float64)
    scores = elimination_order(weight, x.T @ x / len(x), rows=1, units=160, remove=140)[0]

    inverse, left, expected = torch.linalg.inv(damped_moment(x)), list(range(160)), []
    for _ in range(140):  # the textbook's step, on matrices that lose a row and a column each time
        place = int((weight.square().sum(0) / inverse.diagonal()).argmin())
        stays = [column for column in range(len(left)) if column != place]
        row = inverse[place, stays] / inverse[place, place]
        weight = weight[:, stays] - torch.outer(weight[:, place], row)
        inverse = inverse[stays][:, stays] - torch.outer(inverse[stays, place], row)
        expected.append(left.pop(place))
    assert scores.argsort()[:140].tolist() == expected
    assert scores[left].min() == 140


def test_the_cost_that_is_said_is_that_of_the_products():
    source = Shape.of(tiny_model("llama").config)
    units, goes = 256, 192
    source = dataclasses.replace(source, num_hidden_layers=1, intermediate_size=units)
    target = dataclasses.replace(source, intermediate_size=units - goes)
    said = Reconstruction().cost(source, evidence=Evidence(target=target)).other_flops
    x = torch.randn(600, units, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(source.hidden_size, units, generator=torch.Generator().manual_seed(1))
    with FlopCounterMode(display=False) as counted:
        elimination_order(weight, x.T @ x, rows=1, units=units, remove=goes)
    of_moment = 2 * units**2 * 600  # the caller's
    of_inverse, in_place = 2 * units**3, 6 * goes * units**2  # not counted by torch
    assert said == pytest.approx(counted.get_total_flops() - of_moment + of_inverse + in_place, rel=0.01)


def test_costs_may_fall_when_others_go():
    """y = x1 - x2 with x2 = x1 + noise: each is needed as long as the other is there. So no lazy order is exact."""
    x = torch.randn(5000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.tensor(
        [[10.0, 10.0], [0.0, 1.0]], dtype=torch.float64
    )
    moment, weight = damped_moment(x), torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    both, alone = refit_error(weight, moment, [0]), refit_error(weight, moment, [0, 1])
    assert alone - both < 0.9 * refit_error(weight, moment, [1])


def test_of_two_units_that_say_the_same_one_goes_first_and_the_other_stays_to_the_end():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 3 * x[:, 2]
    scores = elimination_order(torch.ones(4, 8), x.T @ x / 500, rows=1, units=8, remove=7)
    assert {int(scores.argmin()), int(scores.argmax())} == {2, 5}


def test_of_pairs_that_say_nearly_the_same_one_each_is_kept_in_the_shapes_of_a_model():
    """A model's MLP of near-duplicate pairs; half of its units go, through the metric that runs use."""
    model = tiny_model("llama", intermediate_size=128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            for read in (layer.mlp.gate_proj, layer.mlp.up_proj):
                noise = 0.05 * read.weight.std() * torch.randn(64, read.weight.shape[1], generator=generator)
                read.weight[1::2] = read.weight[::2] + noise
    source = Shape.of(model.config)
    target = dataclasses.replace(source, intermediate_size=64)
    text = [Inputs(tiny_ids(sequences=32, seed=seed)) for seed in range(16)]
    scores = Reconstruction().scores(model, evidence=Evidence(text=text, target=target))
    layer, seen = model.model.layers[0], []
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])),
        layer.register_forward_hook(lambda _, __, after: seen.append(after)),
    ]
    with torch.no_grad():
        for batch in text:
            model(**batch.keywords())
    for hook in hooks:
        hook.remove()
    x, after = (torch.cat([each.flatten(0, 1) for each in seen[which::2]]).double() for which in (0, 1))
    x *= after.square().mean(-1, keepdim=True).rsqrt()
    moment, weight = damped_moment(x), layer.mlp.down_proj.weight.detach().double()

    kept = scores["intermediate"][0].argsort(descending=True)[:64]
    assert len({int(unit) // 2 for unit in kept}) >= 62  # hardly a pair went whole
    gone = sorted(set(range(128)) - set(kept.tolist()))
    one_by_one: list[int] = []
    while len(one_by_one) < 64:
        rest = [unit for unit in range(128) if unit not in one_by_one]
        inverse = torch.linalg.inv(moment[rest][:, rest])
        refitted = weight @ moment[:, rest] @ inverse
        one_by_one.append(rest[int((refitted.square().sum(0) / inverse.diagonal()).argmin())])
    assert refit_error(weight, moment, gone) == pytest.approx(refit_error(weight, moment, one_by_one), rel=0.01)


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


@pytest.mark.parametrize("family", ["olmo2", "gemma2"])
def test_behind_a_norm_what_counts_is_what_the_norm_lets_through(family: str) -> None:
    """A unit that writes along a direction that the norm's gain closes goes first, however much it writes there."""
    model = tiny_model(family)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_feedforward_layernorm.weight[0] = 0.0 if family == "olmo2" else -1.0  # a gain of 0
            layer.mlp.down_proj.weight[:, 7] = 0.0
            layer.mlp.down_proj.weight[0, 7] = 0.5
    scores = Reconstruction().scores(model, evidence=Evidence(text=BATCHES))
    assert (scores["intermediate"].argmin(-1) == 7).all()
