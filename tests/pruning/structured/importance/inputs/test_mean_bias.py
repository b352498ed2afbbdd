"""Biases that hold the mean of what goes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import PreTrainedModel

from shearing.data.documents import Inputs
from shearing.models.cutting import Selection, compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.inputs.mean_bias import MeanBias, fold_means, with_biases
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model
from tests.pruning.structured.importance.inputs.constants import plant_constants

BATCHES = [Inputs(tiny_ids(sequences=4, seed=seed)) for seed in range(2)]


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def test_what_is_constant_can_be_cut_without_a_trace() -> None:
    model, ids = tiny_model("llama-biases"), tiny_ids(seed=99)
    masks = plant_constants(model)
    whole = logits_of(model, ids)
    subject = MaskedModel(model)
    assert fold_means(subject, masks=masks, batches=BATCHES) == MeanBias(("attention", "mlp"), ())
    source = Shape.of(model.config)
    target = dataclasses.replace(
        source, intermediate_size=38, num_key_value_heads=2, num_attention_heads=2 * source.query_heads_per_group
    )
    selection = Selection.of(masks, source=source, target=target)
    small = compact(subject.release(), masks=masks, selection=selection)
    torch.testing.assert_close(logits_of(small, ids), whole, rtol=1e-4, atol=1e-4)


def test_the_bias_is_the_columns_that_go_times_their_mean_input() -> None:
    model = tiny_model("llama-biases")
    write = model.model.layers[2].self_attn.o_proj
    seen: list[torch.Tensor] = []
    handle = write.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1).double()))
    for batch in BATCHES:
        logits_of(model, batch.tokens)
    handle.remove()
    heads = torch.ones(4, 3, 2)
    heads[:, :, 1] = 0.0
    goes = [head * 8 + channel for head in (1, 3, 5) for channel in range(8)]
    wanted = write.bias.detach().double() + write.weight.detach().double()[:, goes] @ torch.cat(seen)[:, goes].mean(0)
    fold_means(MaskedModel(model), masks=Masks(query_heads=heads), batches=BATCHES)
    torch.testing.assert_close(write.bias.detach(), wanted.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_biases_of_zero_change_nothing_and_are_there_where_the_config_can_have_them(family: str) -> None:
    model, ids = tiny_model(family), tiny_ids()
    biased = with_biases(model)
    torch.testing.assert_close(logits_of(biased, ids), logits_of(model, ids))
    masks = plant_masks(Shape.of(model.config))
    both = ("attention", "mlp")
    has = {"attention": hasattr(model.config, "attention_bias"), "mlp": hasattr(model.config, "mlp_bias")}
    folded = both if family.startswith(("gpt_neox", "seed_oss")) else tuple(kind for kind in both if has[kind])
    found = fold_means(MaskedModel(biased), masks=masks, batches=BATCHES)
    assert found == MeanBias(folded, tuple(kind for kind in ("attention", "mlp") if kind not in folded))
    if folded and not model.config.attention_bias and not family.startswith(("gpt_neox", "seed_oss")):
        assert not any(name.endswith("o_proj.bias") for name, _ in model.named_parameters())


def plant_masks(source: Shape) -> Masks:
    units = torch.ones(source.num_hidden_layers, source.intermediate_size)
    units[:, 3] = 0.0
    groups = torch.ones(source.num_hidden_layers, source.num_key_value_heads)
    groups[:, 1] = 0.0
    return Masks(kv_groups=groups, intermediate=units)


def test_what_loses_nothing_is_neither_folded_nor_left_out() -> None:
    model = tiny_model("llama")
    assert fold_means(MaskedModel(model), masks=Masks(), batches=BATCHES) == MeanBias((), ())
