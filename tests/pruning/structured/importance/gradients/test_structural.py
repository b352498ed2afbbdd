"""The reconstruction of structural importance, from its formula."""

from __future__ import annotations

import statistics

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.pruning.structured.importance.gradients.structural import Structural
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import METRICS
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.structured.importance.gradients.test_taylor import gradient_of_row

TEXT = [Inputs(tiny_ids(sequences=2, seed=3)), Inputs(tiny_ids(sequences=1, seed=4))]


def test_two_importances_over_their_means_and_less_where_a_layers_share_fluctuates() -> None:
    model = tiny_model("llama")
    scores = Structural().scores(model, evidence=Evidence(text=TEXT))
    rows = [gradient_of_row(model, row) for batch in TEXT for row in batch.tokens]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    vectors, elements = torch.zeros(3, 4, 40), torch.zeros(3, 4, 40)
    for n, gradients in enumerate(rows):
        for layer in range(4):
            for name, axis in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
                of_matrix = f"model.layers.{layer}.mlp.{name}.weight"
                products = weights[of_matrix] * gradients[of_matrix]
                for unit in range(40):
                    line = products.select(axis, unit)
                    vectors[n, layer, unit] += line.sum().abs()
                    elements[n, layer, unit] += line.abs().sum()
    importance = vectors / (2 * vectors.mean()) + elements / (2 * elements.mean())
    for layer in range(4):
        shares = [float(importance[n, layer].sum() / importance[n].sum()) for n in range(3)]
        fluctuation = statistics.pstdev(shares) / statistics.mean(shares)
        wanted = importance[:, layer].mean(0) / (1 + fluctuation)
        torch.testing.assert_close(scores["intermediate"][layer], wanted, rtol=1e-4, atol=1e-6)
    assert scores.keys() == METRICS["structural"].gives


def test_the_weights_of_the_two_are_where_the_papers_sum_is_least() -> None:
    """The mean over units of I / (2 σ²) + log σ is least at σ² = mean I."""
    importance = torch.rand(50, generator=torch.Generator().manual_seed(0)).double() * 3
    deviations = torch.linspace(0.2, 3, 20001, dtype=torch.float64)
    values = importance.mean() / (2 * deviations**2) + deviations.log()
    assert float(deviations[values.argmin()] ** 2) == pytest.approx(float(importance.mean()), rel=1e-3)


def test_one_row_fluctuates_by_nothing() -> None:
    scores = Structural().scores(tiny_model("llama"), evidence=Evidence(text=TEXT[1:]))
    assert all(values.isfinite().all() and (values > 0).any() for values in scores.values())
    assert float(scores["intermediate"].mean()) == pytest.approx(1.0, rel=1e-4)
