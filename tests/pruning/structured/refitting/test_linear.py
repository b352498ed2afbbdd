"""Weights that make up for the units that go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.models.anatomy import decoder_layers
from shearing.models.cutting import compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.reconstruction import Reconstruction
from shearing.pruning.structured.refitting.least_squares import LEAST_ROWS, RIDGE, RIDGES
from shearing.pruning.structured.refitting.linear import refit
from shearing.pruning.structured.rounding import select
from tests.models.declared import declared_families
from tests.models.test_exactness import follows_width
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model
from tests.pruning.calibration.test_walk import residual_streams
from tests.pruning.structured.importance.inputs.constants import plant_constants

BATCHES = [Inputs(tiny_ids(sequences=8, seed=seed)) for seed in range(8)]


def masked_logits(model: MaskedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.head().logits(model(ids))


def test_the_refit_makes_up_exactly_for_units_that_others_repeat():
    """Head 1 of each group and unit 9 repeat head 0 and unit 4: without them the logits have to stay as they are."""
    model = tiny_model("llama")
    source = Shape.of(model.config)
    dh, group = source.head_dim, source.query_heads_per_group
    with torch.no_grad():
        for layer in model.model.layers:
            q, up, gate = layer.self_attn.q_proj.weight, layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight
            for first in range(0, source.num_attention_heads, group):
                q[(first + 1) * dh : (first + 2) * dh] = q[first * dh : (first + 1) * dh]
            gate[9], up[9] = gate[4], 2 * up[4]
    heads = torch.ones(source.num_hidden_layers, source.num_key_value_heads, group)
    heads[..., 1] = 0.0
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, 9] = 0.0
    masks, ids = Masks(query_heads=heads, intermediate=units), tiny_ids(seed=99)
    subject = MaskedModel(model)
    whole = masked_logits(subject, ids)
    subject.set_masks(masks)
    cut = masked_logits(subject, ids)
    refit(subject, masks=masks, batches=BATCHES, ridge=1e-6)
    error, error_before = (masked_logits(subject, ids) - whole).norm(), (cut - whole).norm()
    assert error < 1e-3 * error_before


@pytest.mark.parametrize("family", ["gpt_neox", "gpt_neox-in-turn"])
def test_sub_layers_side_by_side_make_up_exactly_too(family: str):
    """Head 1 and unit 9 repeat head 0 and unit 4."""
    model = tiny_model(family)
    source = Shape.of(model.config)
    rows = 3 * source.head_dim
    with torch.no_grad():
        for layer in decoder_layers(model):
            for of_heads in layer.attention.query_key_value.parameters():
                of_heads[rows : 2 * rows] = of_heads[:rows]
            for of_units in layer.mlp.dense_h_to_4h.parameters():
                of_units[9] = of_units[4]
    groups = torch.ones(source.num_hidden_layers, source.num_key_value_heads)
    groups[:, 1] = 0.0
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, 9] = 0.0
    masks, ids = Masks(kv_groups=groups, intermediate=units), tiny_ids(seed=99)
    subject = MaskedModel(model)
    whole = masked_logits(subject, ids)
    subject.set_masks(masks)
    cut = masked_logits(subject, ids)
    refit(subject, masks=masks, batches=BATCHES, ridge=1e-6)
    assert (masked_logits(subject, ids) - whole).norm() < 1e-3 * (cut - whole).norm()


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("tied", [True, False])
def test_the_refit_brings_the_residual_stream_closer_to_the_whole_models(family: str, tied: bool):
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    target = dataclasses.replace(
        source,
        num_hidden_layers=source.num_hidden_layers - 1,
        intermediate_size=source.intermediate_size * 3 // 4,
        hidden_size=source.hidden_size - source.num_attention_heads,
    )
    if follows_width(source):
        groups = source.num_key_value_heads - 1
        heads = groups * source.query_heads_per_group
        sizes = {"num_key_value_heads": groups, "num_attention_heads": heads, "hidden_size": heads * source.head_dim}
        target = dataclasses.replace(target, **sizes)
    scores = Reconstruction().scores(model, evidence=Evidence(text=BATCHES, target=target))
    scores["layers"] = (torch.arange(source.num_hidden_layers) != 1).float()
    masks, selection = select(scores, source=source, target=target)
    subject, ids = MaskedModel(model), BATCHES[0].tokens
    whole = residual_streams(subject, ids)
    subject.set_masks(masks)
    cut = residual_streams(subject, ids)
    layers = []
    refit(subject, masks=masks, batches=BATCHES, ridge=0.01, advance=layers.append)
    refitted = residual_streams(subject, ids)
    assert layers == [1] * source.num_hidden_layers
    alive = masks.hidden > 0
    for layer, (wanted, before, after) in enumerate(zip(whole, cut, refitted, strict=True)):
        if source.family.parallel and layer == 1:
            continue  # the layer that is gone: nothing has made up for it yet
        size = wanted.norm(dim=-1, keepdim=True)
        assert ((after - wanted) / size)[..., alive].norm() < ((before - wanted) / size)[..., alive].norm()

    masked = masked_logits(subject, ids)
    small = compact(subject.release(), masks=masks, selection=selection)
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, masked, rtol=1e-4, atol=1e-4)


def test_the_refit_without_anything_to_make_up_for_changes_nothing():
    model = tiny_model("qwen3")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    source = Shape.of(model.config)
    masks = Masks(intermediate=torch.ones(source.num_hidden_layers, source.intermediate_size))
    subject = MaskedModel(model.train())
    refit(subject, masks=masks, batches=BATCHES[:2])
    assert model.training
    for name, parameter in subject.release().named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["phi3", "starcoder2"])
def test_other_families_that_are_declared_are_refitted(family: str):
    with declared_families():
        subject = MaskedModel(tiny_model(family))
        shape = Shape.of(subject.model.config)
        units = torch.ones(shape.num_hidden_layers, shape.intermediate_size)
        units[:, :10] = 0.0
        masks, ids = Masks(intermediate=units), tiny_ids(seed=99)
        whole = masked_logits(subject, ids)
        subject.set_masks(masks)
        cut = masked_logits(subject, ids)
        refit(subject, masks=masks, batches=BATCHES)
        assert (masked_logits(subject, ids) - whole).norm() < (cut - whole).norm()


@pytest.mark.parametrize("ridge", [0.01, 1.5, 1e6])
def test_biases_of_writes_hold_the_mean_of_what_goes(ridge: float):
    """Units and heads that say the same at every token: without them nothing has changed, however weights are held."""
    model, ids = tiny_model("llama-biases"), tiny_ids(seed=99)
    masks = plant_constants(model)
    subject = MaskedModel(model)
    whole = masked_logits(subject, ids)
    subject.set_masks(masks)
    assert (masked_logits(subject, ids) - whole).abs().max() > 1e-2
    refit(subject, masks=masks, batches=BATCHES, ridge=ridge)
    torch.testing.assert_close(masked_logits(subject, ids), whole, rtol=1e-3, atol=1e-3)


def test_held_out_rows_choose_a_ridge_for_each_matrix():
    model = tiny_model("llama")
    source = Shape.of(model.config)
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, ::2] = 0.0
    masks, subject = Masks(intermediate=units), MaskedModel(model)
    found = refit(subject, masks=masks, batches=BATCHES, ridge="auto")
    assert len(found.ridges) == 4 * source.num_hidden_layers
    assert set(found.ridges.values()) <= set(RIDGES)
    assert not found.blocks
    # Too few rows for one to be held out.
    few = refit(subject, masks=masks, batches=[BATCHES[0].part(0, LEAST_ROWS - 1)], ridge="auto")
    assert set(few.ridges.values()) == {RIDGE}
