"""The loss without a layer is that of the model that really lacks it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.depth.leave_one_out import GreedyLeaveOneOut, LeaveOneOut
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS, metric_of
from tests.models.tiny import tiny_ids, tiny_model
from tests.models.trained import counting, trained_model
from tests.pruning.structured.importance.depth.oracle import loss_of, shortened

TEXT = [Inputs(counting(sequences=16, seed=1_000 + seed)) for seed in range(2)]


def test_the_score_of_a_layer_is_the_loss_of_the_model_that_lacks_it() -> None:
    model = trained_model()
    scores = LeaveOneOut().scores(model, evidence=Evidence(text=TEXT))
    expected = [loss_of(shortened(model, without={layer}), TEXT) for layer in range(6)]
    torch.testing.assert_close(scores["layers"], torch.tensor(expected))


def test_sublayers_are_on_one_scale_and_one_that_writes_nothing_is_not_missed() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    text = [Inputs(tiny_ids())]
    scores = LeaveOneOut(parts="sublayers").scores(model, evidence=Evidence(text=text))
    assert float(scores["attention"][1]) == pytest.approx(loss_of(model, text), rel=1e-5)
    assert float(scores["mlp"][2]) == pytest.approx(float(scores["attention"][1]), rel=1e-5)
    assert len(torch.cat([scores["attention"], scores["mlp"]]).unique()) >= 7


def explicit_greedy(model, *, remove: int) -> list[int]:
    """Layers in the order in which they go, by models that really lack them."""
    gone: list[int] = []
    for _ in range(remove):
        left = [layer for layer in range(6) if layer not in gone]
        gone.append(min(left, key=lambda layer: loss_of(shortened(model, without={*gone, layer}), TEXT)))
    return gone


def test_the_greedy_order_is_that_of_models_that_really_lack_the_layers() -> None:
    model = trained_model()
    target = dataclasses.replace(Shape.of(model.config), num_hidden_layers=3)
    scores = GreedyLeaveOneOut().scores(model, evidence=Evidence(text=TEXT, target=target))["layers"]
    assert sorted(scores.tolist()) == list(range(6))
    assert scores.argsort()[:3].tolist() == explicit_greedy(model, remove=3)


def test_the_greedy_pair_is_near_the_best_of_all_pairs() -> None:
    model = trained_model()
    target = dataclasses.replace(Shape.of(model.config), num_hidden_layers=4)
    scores = GreedyLeaveOneOut().scores(model, evidence=Evidence(text=TEXT, target=target))["layers"]
    losses = {pair: loss_of(shortened(model, without=pair), TEXT) for pair in itertools.combinations(range(6), 2)}
    chosen = losses[tuple(sorted(scores.argsort()[:2].tolist()))]
    best, median = min(losses.values()), sorted(losses.values())[len(losses) // 2]
    assert best <= chosen < best + (median - best) / 2


BY_LOSS = [name for name, facts in METRICS.items() if facts.gives <= {"layers", "attention", "mlp"}]
BY_LOSS.remove("block_influence")


@pytest.mark.parametrize("name", BY_LOSS)
def test_losses_that_are_no_numbers_end_in_one_error_and_the_model_as_it_was(name: str) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ShearingError, match="initial_masks"):
        metric_of(name).scores(model, evidence=Evidence(text=[Inputs(tiny_ids())]))
    assert not any(module._forward_hooks for module in model.modules())
