"""Blocks that are trained alone after the linear refit."""

from __future__ import annotations

import copy

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.models.anatomy import decoder_layers
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.calibration.walk import first_inputs
from shearing.pruning.structured.refitting.blocks import block_refit_cost
from shearing.pruning.structured.refitting.linear import refit, refit_cost
from shearing.pruning.structured.refitting.recipe import BlockRefitRecipe
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.calibration.test_walk import residual_streams

BATCHES = [Inputs(tiny_ids(sequences=4, seed=seed)) for seed in range(4)]


def _masks(source: Shape) -> Masks:
    """Without layer 1, the first units, and the last hidden dimensions."""
    layers = torch.ones(source.num_hidden_layers)
    layers[1] = 0.0
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, : source.intermediate_size // 3] = 0.0
    hidden = torch.ones(source.hidden_size)
    hidden[-6:] = 0.0
    return Masks(attention=layers, mlp=layers, intermediate=units, hidden=hidden)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_error_of_every_block_falls_and_is_what_its_output_lacks(family: str) -> None:
    model = tiny_model(family)
    source = Shape.of(model.config)
    masks, subject = _masks(source), MaskedModel(model)
    whole = [residual_streams(subject, batch.tokens) for batch in BATCHES]
    subject.set_masks(masks)
    linear = MaskedModel(copy.deepcopy(subject.release()))
    refit(linear, masks=masks, batches=BATCHES)
    streams, calls = first_inputs(subject.model, BATCHES)

    steps = BlockRefitRecipe(steps=12, learning_rate=1e-3)
    found = refit(subject := MaskedModel(subject.model), masks=masks, batches=BATCHES, blocks=steps)
    kept = [index for index in range(source.num_hidden_layers) if index != 1]
    assert list(found.blocks) == kept
    alive = masks.hidden > 0
    for index in kept:
        # From what the whole model gives: behind layer 0 where layer 1 is gone.
        lacks = []
        for batch, of_layers in enumerate(calls):
            before = streams[batch] if index == 0 else whole[batch][index - (2 if index == 2 else 1)]
            call, layer = of_layers[index], decoder_layers(linear.model)[index]
            with torch.no_grad():
                output = layer(before * masks.hidden, *call.arguments, **call.keywords)
            output = output[0] if isinstance(output, tuple) else output
            wanted = whole[batch][index]
            lacks.append((wanted - output)[..., alive].square().mean(-1) / wanted.square().mean(-1))
        assert found.blocks[index].before == pytest.approx(float(torch.cat(lacks).mean()), rel=1e-4)
        assert found.blocks[index].after < found.blocks[index].before

    # The first block reads the same stream in the model, so its output is what training has made of it.
    after = torch.cat([residual_streams(subject, batch.tokens)[0] for batch in BATCHES])
    wanted = torch.cat([each[0] for each in whole])
    lacks = (wanted - after)[..., alive].square().mean(-1) / wanted.square().mean(-1)
    assert found.blocks[0].after == pytest.approx(float(lacks.mean()), rel=1e-4)


def test_no_steps_are_the_linear_refit_and_the_same_steps_the_same_weights() -> None:
    weights = []
    for steps in (None, 0, 3, 3):
        subject = MaskedModel(tiny_model("llama"))
        blocks = None if steps is None else BlockRefitRecipe(steps=steps, learning_rate=1e-3)
        found = refit(subject, masks=_masks(Shape.of(subject.model.config)), batches=BATCHES[:2], blocks=blocks)
        assert bool(found.blocks) == bool(steps)
        weights.append(dict(subject.release().named_parameters()))
    for name, plain in weights[0].items():
        assert torch.equal(weights[1][name], plain)
        assert torch.equal(weights[2][name], weights[3][name])
    assert any(not torch.equal(weights[2][name], plain) for name, plain in weights[0].items())


def test_how_the_text_is_cut_up_into_batches_does_not_matter() -> None:
    weights = []
    for batches in (BATCHES[:2], [part for batch in BATCHES[:2] for part in (batch.part(0, 3), batch.part(3, 4))]):
        subject = MaskedModel(tiny_model("llama"))
        blocks = BlockRefitRecipe(steps=3, sequences=3, learning_rate=1e-3)
        refit(subject, masks=_masks(Shape.of(subject.model.config)), batches=batches, blocks=blocks)
        weights.append(dict(subject.release().named_parameters()))
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-5)


def test_a_block_that_steps_make_no_better_stays_as_it_was() -> None:
    weights = []
    for blocks in (None, BlockRefitRecipe(steps=2, learning_rate=1e4)):
        subject = MaskedModel(tiny_model("llama"))
        found = refit(subject, masks=_masks(Shape.of(subject.model.config)), batches=BATCHES[:2], blocks=blocks)
        weights.append(dict(subject.release().named_parameters()))
    assert all(block.after == block.before for block in found.blocks.values())
    assert all(torch.equal(weights[1][name], plain) for name, plain in weights[0].items())


def test_steps_cost_what_products_of_whole_layers_take() -> None:
    source = Shape.of(tiny_model("llama").config)
    sizes = {"source": source, "target": source, "text_tokens": 100}
    settings = BlockRefitRecipe(steps=7, sequences=5)
    layers = source.num_hidden_layers * sum(source.layer_parameters())
    cost = block_refit_cost(**sizes, settings=settings, sequence_length=8)
    assert cost.other_flops == (6 * 7 * 40 + 2 * 2 * 100) * layers
    both = refit_cost(**sizes, blocks=settings, sequence_length=8)
    assert both.other_flops == refit_cost(**sizes).other_flops + cost.other_flops
    assert refit_cost(**sizes, ridge="auto").other_flops > refit_cost(**sizes).other_flops
