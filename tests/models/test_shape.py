"""Shapes: what a target may be, and what an impossible one is told."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.families import FAMILIES
from shearing.models.loading import load_config, load_source
from shearing.models.recipe import TargetRecipe
from shearing.models.shape import Shape, export_error, other_architecture, resolve_target
from tests.models.tiny import CONFIGS, tiny_model


def test_sizes_left_out_are_the_sources():
    config = CONFIGS["llama"]()
    shape = resolve_target(TargetRecipe(intermediate_size=16), source=config)
    assert shape.sizes() == {**Shape.of(config).sizes(), "intermediate_size": 16}


def test_heads_follow_groups():
    assert resolve_target(TargetRecipe(num_key_value_heads=1), source=CONFIGS["llama"]()).num_attention_heads == 2
    mha = CONFIGS["llama-mha"]()
    assert resolve_target(TargetRecipe(num_attention_heads=4), source=mha).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("target", "field", "mend"),
    [
        ({"hidden_size": 64}, "hidden_size", "hidden_size=36"),
        ({"num_hidden_layers": 9}, "num_hidden_layers", "num_hidden_layers=4"),
        ({"num_attention_heads": 4}, "num_attention_heads", "num_attention_heads=3"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 1},
            "num_attention_heads",
            "set num_attention_heads=2",
        ),
    ],
)
def test_impossible_targets_name_the_nearest_valid_one(target, field, mend):
    with pytest.raises(ShearingError) as caught:
        resolve_target(TargetRecipe(**target), source=CONFIGS["llama"]())
    assert caught.value.field == field
    assert mend in caught.value.mend


def test_heads_that_llama_refuses_are_held_by_the_nearest_architecture():
    odd = TargetRecipe(hidden_size=25, num_attention_heads=3)
    for biases, architecture in (
        ({}, "MistralForCausalLM"),
        ({"attention_bias": True}, "SeedOssForCausalLM"),
        ({"mlp_bias": True}, "SeedOssForCausalLM"),
    ):
        source = CONFIGS["llama"](**biases)
        shape = resolve_target(odd, source=source)
        assert other_architecture(shape, source=source) == architecture
        assert export_error(shape, source=source, own=True) is not None  # what a budget may end in
        even = resolve_target(TargetRecipe(hidden_size=24, num_attention_heads=3), source=source)
        assert other_architecture(even, source=source) is None


@pytest.mark.parametrize("family", ["gpt_neox", "phi3-longrope"])
def test_where_the_config_counts_head_dimensions_the_nearest_sizes_are_named(family):
    source = CONFIGS[family]()
    per_group = Shape.of(source).query_heads_per_group
    groups = 4 // per_group
    with pytest.raises(ShearingError) as caught:
        resolve_target(TargetRecipe(hidden_size=24, num_key_value_heads=groups), source=source)
    assert caught.value.field == "hidden_size"
    assert "[32" in caught.value.allowed
    assert "num_attention_heads [3" in caught.value.allowed or per_group > 1
    assert "hidden_size=32" in caught.value.mend
    fitting = resolve_target(TargetRecipe(hidden_size=32, num_key_value_heads=groups), source=source)
    assert (fitting.num_attention_heads, fitting.head_dim) == (4, 8)


def test_an_unsupported_architecture_is_refused_by_name():
    with pytest.raises(ShearingError, match="gpt2") as caught:
        anatomy_of(GPT2Config())
    assert all(family in caught.value.allowed for family in FAMILIES)


def test_undeclared_parameters_are_refused():
    model = tiny_model()
    model.model.layers[0].self_attn.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ShearingError, match="extra"):
        anatomy_of(model)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ShearingError, match=r"^source = "):
        load_config(str(tmp_path))
    with pytest.raises(ShearingError, match=r"^source = "):
        load_config(str(tmp_path / "missing" / "deep" / "folder"))


def test_nan_in_the_source_is_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ShearingError, match=r"layers\.1\.mlp\.up_proj"):
        load_source(str(tmp_path))


def test_missing_weights_are_refused(tmp_path):
    model = tiny_model(tied=False)
    state = model.state_dict()
    del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ShearingError, match="up_proj"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("family", CONFIGS)
def test_parameter_counts_are_those_of_the_real_model(family):
    for tied in (False, True):
        config = CONFIGS[family](tie_word_embeddings=tied)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        shape = Shape.of(config)
        assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
        embeddings = {parameter.name for parameter in shape.family.embeddings}
        outer = sum(p.numel() for n, p in model.named_parameters() if n in embeddings)
        assert shape.num_parameters(embeddings=False) == shape.num_parameters() - outer


def test_the_config_survives_a_round_trip(tmp_path):
    model = tiny_model("qwen2-sliding")
    model.save_pretrained(tmp_path)
    assert Shape.of(AutoConfig.from_pretrained(tmp_path)) == Shape.of(model.config)
