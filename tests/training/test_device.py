"""Layers whose weights are in host memory compute what they did, with no more than one of them fetched at a time."""

from __future__ import annotations

from typing import Any

import torch

from shearing.models.anatomy import backbone, decoder_layers
from shearing.training.device import offload_layers
from tests.models.tiny import tiny_ids, tiny_model

CPU = torch.device("cpu")


@torch.no_grad()
def test_offloaded_layers_give_the_same_numbers_one_after_the_other() -> None:
    """What is fetched is a copy on every device, so it can be told here from what stays in host memory."""
    ids = tiny_ids()
    expected = backbone(tiny_model())(input_ids=ids, use_cache=False).last_hidden_state
    model = tiny_model()
    layers = decoder_layers(model)
    at_home = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]

    def away() -> list[int]:
        found = [[weight.data_ptr() for weight in layer.parameters()] for layer in layers]
        return [number for number, (now, home) in enumerate(zip(found, at_home, strict=True)) if now != home]

    offload_layers(model, device=CPU)
    assert away() == []
    seen: list[list[int]] = []

    def look(*_: Any) -> None:
        seen.append(away())

    for layer in layers:
        layer.mlp.register_forward_hook(look)
    for _ in range(2):
        assert torch.equal(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state, expected)
        assert away() == []
    assert seen == [[0], [1], [2], [3]] * 2
