"""What an optimiser's state becomes when a model is cut, of models of every kind."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from shearing.models.cutting import Selection, compact, compact_moments
from shearing.models.masked import MaskedModel, Masks
from tests.models.tiny import tiny_ids


def require_moments_of_the_cut(model: PreTrainedModel, *, masks: Masks, selection: Selection) -> None:
    """The gradient of the masked model, cut like its weights, is the gradient of the cut model."""
    masked = MaskedModel(model)
    masked.set_masks(masks)
    masked.model(tiny_ids()).logits.square().mean().backward()
    masked.release()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    small: Any = compact(model, masks=masks, selection=selection).requires_grad_(True)
    small(tiny_ids()).logits.square().mean().backward()
    steps = dict.fromkeys(gradients, torch.tensor(3.0))
    found = compact_moments(model, {"exp_avg": gradients, "step": steps}, selection=selection)
    assert set(found["exp_avg"]) == set(found["step"]) == {name for name, _ in small.named_parameters()}
    for name, parameter in small.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found["exp_avg"][name], parameter.grad, rtol=1e-4, atol=1e-5 * largest)
        assert float(found["step"][name]) == 3.0
