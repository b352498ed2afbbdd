"""Shapes: what a target may be, and what an impossible one is told."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.families import FAMILIES
from shearing.models.loading import load_config, load_source
from shearing.models.recipe import TargetRecipe
from shearing.models.shape import Shape, config_for, export_error, other_architecture, resolve_target
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


def test_sizes_left_out_are_the_sources():
    config = CONFIGS["llama"]()
    shape = resolve_target(TargetRecipe(intermediate_size=16), source=config)
    assert shape.sizes() == {**Shape.of(config).sizes(), "intermediate_size": 16}


def test_a_number_of_parameters_is_no_shape():
    with pytest.raises(ShearingError, match="shape_or_budget") as raised:
        resolve_target(TargetRecipe(parameters=15_000, uniform=True), source=CONFIGS["llama"]())
    assert raised.value.field == "parameters"


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


REFUSED = {
    "gemma3": (
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "gemma3, which reads more than text",
        "its text model alone can be the source: save it as the gemma3_text",
    ),
    "other text": (
        {"model_type": "blip_2", "text_config": {"model_type": "opt"}},
        "blip_2, which reads more than text",
        "its text model, opt, is of no supported family either",
    ),
    "linear attention": (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        "qwen3_next, whose layers are not all attention and MLP",
        "choose a source model whose layers are",
    ),
    "Mamba": ({"model_type": "bamba", "mamba_d_state": 128}, "bamba, whose layers are not all", "states of its own"),
    "remote code": (
        {"model_type": "internlm", "auto_map": {"AutoConfig": "configuration.C"}},
        "internlm, with code of its own",
        "code that comes with a model is not run",
    ),
    "both directions": (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "gemma3_text that attends in both directions",
        "without use_bidirectional_attention",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_of_no_family_is_told_what_is_supported_and_what_of_it_could_be(kind, tmp_path):
    values, value, mend = REFUSED[kind]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ShearingError) as refused:
        load_config(str(tmp_path))
    assert value in str(refused.value.value)
    assert mend in refused.value.mend
    assert refused.value.allowed == ", ".join(sorted(FAMILIES))


def test_the_text_model_of_one_that_sees_is_a_source(tmp_path):
    """As docs/families.md takes it out."""
    text = CONFIGS["gemma3"](tie_word_embeddings=True, final_logit_softcapping=None)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(ShearingError, match="its text model alone can be the source"):
        load_config(str(tmp_path / "whole"))
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "whole", dtype="auto")
    alone = AutoModelForCausalLM.from_config(whole.config.text_config, dtype=whole.dtype)
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.save_pretrained(tmp_path / "text")
    source = load_source(str(tmp_path / "text"))
    assert anatomy_of(source) == FAMILIES["gemma3_text"].of(text)
    torch.testing.assert_close(source(tiny_ids()).logits, whole.eval()(tiny_ids()).logits)


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


@pytest.mark.parametrize(
    ("kept", "turns", "interval"),
    [
        (range(36), [1, 1, 1, 0] * 9, 4),
        (range(24), [1, 1, 1, 0] * 6, 4),
        ([0, 1, 3, 4, 5, 7], [1, 1, 0] * 2, 3),
        ([0, 1, 2], [1, 1, 1], 4),
        ([0, 3, 7, 8], [1, 0, 0, 1], 4),  # none fits: the list decides
    ],
)
def test_layers_without_positions_stay_those_that_are_kept(kept, turns, interval):
    source = SmolLM3Config()
    shape = dataclasses.replace(Shape.of(source), num_hidden_layers=len(kept))
    config = config_for(source, shape=shape, attention_layers=kept)
    assert config.no_rope_layers == turns
    assert config.no_rope_layer_interval == interval
    again = SmolLM3Config.from_dict(config.to_dict())
    assert again.no_rope_layers == turns


def test_layers_with_windows_stay_those_that_are_kept():
    source = Gemma3TextConfig(num_hidden_layers=12)
    shape = dataclasses.replace(Shape.of(source), num_hidden_layers=3)
    config = config_for(source, shape=shape, attention_layers=[4, 5, 11])
    assert config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    assert config.rope_parameters == source.rope_parameters


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
