"""The balance of experts in a step: part of what is minimised, however the batch is shared out or recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shearing.models.families.experts.balance import RouterBalance
from shearing.models.masked import MaskedModel
from shearing.models.shape import Shape
from shearing.objectives.language_model import LanguageModelLoss
from shearing.training.device import checkpoint_activations
from tests.models.experts import expert_configs, masks_and_target
from tests.models.tiny import tiny_ids, tiny_model


@pytest.fixture(autouse=True, scope="module")
def _configs() -> Iterator[None]:
    with expert_configs():
        yield


def gradients(model: Any, tokens: torch.Tensor, *, micro_batch: int) -> dict[str, torch.Tensor]:
    """Of the sum of losses, added up over micro-batches."""
    objective = LanguageModelLoss(model, chunk_tokens=16).train()
    model.zero_grad()
    for part in tokens.split(micro_batch):
        objective(part).total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_total_is_the_loss_and_the_balance_of_each_label() -> None:
    model = tiny_model("olmoe", tied=False)
    tokens = tiny_ids(sequences=4, length=17)
    objective = LanguageModelLoss(model, chunk_tokens=16).train()
    trained = objective(tokens)
    balance = RouterBalance.of(model)
    assert balance is not None
    with balance.listening() as heard:
        model(tokens[:, :-1])
    torch.testing.assert_close(trained.total, trained.rows.sum() + 16 * balance.weighed(heard, sequences=4).sum())
    measured = objective.eval()(tokens)
    torch.testing.assert_close(measured.total, measured.rows.sum())
    model.config.router_aux_loss_coef = 0.0
    torch.testing.assert_close(LanguageModelLoss(model, chunk_tokens=16).train()(tokens).total, trained.rows.sum())


@pytest.mark.parametrize("masked", [False, True])
def test_shares_of_a_batch_and_recomputed_layers_change_nothing(masked: bool) -> None:
    model = tiny_model("qwen3_moe", tied=False)
    model.config.router_aux_loss_coef = 0.5
    tokens = tiny_ids(sequences=4, length=17)
    if masked:
        masks, _ = masks_and_target(
            Shape.of(model.config), ("layers", "experts", "intermediate"), fractional=True, seed=1
        )
        wrapper = MaskedModel(model)
        wrapper.set_masks(masks)
    whole = gradients(model, tokens, micro_batch=4)
    one_by_one = gradients(model, tokens, micro_batch=1)
    checkpoint_activations(model, selective=False)
    recomputed = gradients(model, tokens, micro_batch=4)
    checkpoint_activations(model, selective=True)
    selected = gradients(model, tokens, micro_batch=2)
    for name, gradient in whole.items():
        for other in (one_by_one, recomputed, selected):
            largest = float(gradient.abs().max())
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5 * largest + 1e-9)
