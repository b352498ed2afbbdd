"""Units and heads that write the same at every token."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from shearing.models.masked import Masks
from shearing.models.shape import Shape


def plant_constants(model: PreTrainedModel) -> Masks:
    """Makes units 3 and 8 and KV group 1 of every layer of a model with biases constant; masks without them."""
    source = Shape.of(model.config)
    dh, biases = source.head_dim, torch.Generator().manual_seed(7)
    with torch.no_grad():
        for layer in model.model.layers:
            for unit in (3, 8):
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    linear.weight[unit] = 0.0
                    linear.bias[unit] = 1.0 + torch.rand((), generator=biases)
            layer.self_attn.v_proj.weight[dh : 2 * dh] = 0.0
            layer.self_attn.v_proj.bias[dh : 2 * dh] = torch.randn(dh, generator=biases)
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, [3, 8]] = 0.0
    groups = torch.ones(source.num_hidden_layers, source.num_key_value_heads)
    groups[:, 1] = 0.0
    return Masks(kv_groups=groups, intermediate=units)
