"""Families: counts from declared axes, and families declared outside the project that are masked and cut exactly."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import AutoModelForCausalLM

from shearing.models.anatomy import anatomy_of, decoder_layers
from shearing.models.cutting import Selection, compact
from shearing.models.families import FAMILIES
from shearing.models.families.axes import Axis, Unit
from shearing.models.masked import MaskedModel, Masks
from shearing.models.recipe import TargetRecipe
from shearing.models.shape import Shape, config_for, resolve_target
from shearing.pruning.structured.parameter_budget import count_parameters
from tests.models import test_exactness as exactness, tiny
from tests.models.declared import DECLARED, DECLARED_CONFIGS, declared_families
from tests.repository import ROOT

EVERY_CONFIG = {**tiny.CONFIGS, **DECLARED_CONFIGS}
NEWER = ("phi3", "gpt_neox", "gpt_neox-in-turn")
"""Shipped families that are not like Llama."""


@pytest.fixture(autouse=True, scope="module")
def _declared() -> Iterator[None]:
    with declared_families():
        yield


@pytest.mark.parametrize("fractional", [False, True], ids=["binary", "fractional"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DECLARED_CONFIGS)
def test_masked_equals_compacted(family, tied, fractional):
    difference = exactness.relative_difference(
        family, exactness.GRANULARITIES, tied=tied, fractional=fractional, seed=1
    )
    assert difference < 1e-5


@pytest.mark.parametrize("granularities", [*exactness.SUBSETS, *exactness.SUBLAYERS])
@pytest.mark.parametrize("family", DECLARED)
def test_masked_equals_compacted_for_every_subset_of_granularities(family, granularities):
    assert exactness.relative_difference(family, granularities, tied=True, fractional=True, seed=2) < 1e-5


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DECLARED_CONFIGS)
def test_moments_of_the_cut_model(family, tied):
    exactness.test_moments_of_the_cut_model_are_those_it_would_have_had(family, tied)


@pytest.mark.parametrize("family", [*NEWER, *DECLARED_CONFIGS])
def test_open_masks_are_the_dense_model(family):
    model = tiny.tiny_model(family)
    dense = model(tiny.tiny_ids()).logits
    wrapped = MaskedModel(model)
    torch.testing.assert_close(wrapped.model(tiny.tiny_ids()).logits, dense, rtol=1e-5, atol=1e-5)
    wrapped.set_masks(Masks(hidden=torch.ones(model.config.hidden_size), attention=torch.ones(4), mlp=torch.ones(4)))
    torch.testing.assert_close(wrapped.model(tiny.tiny_ids()).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*NEWER, *DECLARED_CONFIGS])
def test_a_layer_mask_scales_what_the_layer_adds(family):
    """Also where a norm after the write would undo a scale of the write."""
    model = tiny.tiny_model(family)
    layer = decoder_layers(model)[0]
    streams = []
    layer.register_forward_hook(lambda _module, arguments, output: streams.append(output - arguments[0]))
    wrapped = MaskedModel(model)
    only_attention = torch.tensor([0.0, 1, 1, 1])
    for value in (1.0, 0.25):
        wrapped.set_masks(Masks(attention=torch.tensor([value, 1, 1, 1]), mlp=only_attention))
        wrapped(tiny.tiny_ids())
    torch.testing.assert_close(streams[1], 0.25 * streams[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", DECLARED_CONFIGS)
def test_a_planned_config_loads(family, tmp_path):
    config = EVERY_CONFIG[family](tie_word_embeddings=True)
    wanted = TargetRecipe(num_hidden_layers=2, hidden_size=24, intermediate_size=17, num_key_value_heads=2)
    target = resolve_target(wanted, source=config)
    planned = config_for(config, shape=target, attention_layers=[1, 3])
    assert Shape.of(planned) == target
    model = tiny.tiny_model(family)
    source = Shape.of(model.config)
    masks, target = exactness.masks_and_target(source, exactness.GRANULARITIES, fractional=False, seed=3)
    small = compact(model, masks=masks, selection=Selection.of(masks, source=source, target=target))
    small.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(loaded(tiny.tiny_ids()).logits, small(tiny.tiny_ids()).logits, rtol=0, atol=0)
    assert loaded.generate(tiny.tiny_ids(), max_new_tokens=4, do_sample=False).shape == (2, 20)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(sorted(EVERY_CONFIG)),
    tied=st.booleans(),
    layers=st.integers(1, 3),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    width=st.integers(1, 5),
    intermediate=st.integers(1, 50),
    half_head=st.integers(1, 8),
    vocabulary=st.integers(4, 200),
)
def test_counts_are_those_of_the_real_model(
    family, tied, layers, groups, per_group, width, intermediate, half_head, vocabulary
):
    heads = groups * per_group
    config = EVERY_CONFIG[family.removesuffix("-mha").removesuffix("-longrope")](tie_word_embeddings=tied)
    values = {
        **config.to_dict(),
        "num_hidden_layers": layers,
        "hidden_size": heads * width,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 2 * half_head,
        "vocab_size": vocabulary,
        "pad_token_id": None,
        "layer_types": None,
    }
    config = type(config).from_dict(values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = Shape.of(config)
    parameters = dict(model.named_parameters())
    assert anatomy_of(model) == shape.family
    assert shape.num_parameters() == sum(p.numel() for p in parameters.values())
    embeddings = {parameter.name for parameter in shape.family.embeddings}
    outer = sum(p.numel() for name, p in parameters.items() if name in embeddings)
    assert shape.num_parameters(embeddings=False) == shape.num_parameters() - outer
    for kind, counted in zip(shape.family.sublayers.values(), shape.layer_parameters(), strict=True):
        named = {name: parameters[f"{shape.family.layers}.0.{name}"] for name in kind.axes}
        assert counted == sum(p.numel() for p in named.values())
        for name, axes in kind.axes.items():
            assert tuple(axis.size(shape.units()) for axis in axes) == tuple(named[name].shape)
    everything = {"hidden": torch.ones(shape.hidden_size), "layers": torch.ones(layers)}
    assert int(count_parameters(everything, source=shape)) == shape.num_parameters()


@pytest.mark.parametrize("family", EVERY_CONFIG)
def test_a_budget_counts_what_a_cut_leaves(family):
    source = Shape.of(EVERY_CONFIG[family](tie_word_embeddings=False))
    masks, target = exactness.masks_and_target(source, exactness.GRANULARITIES, fractional=False, seed=0)
    assert int(count_parameters(masks.tensors(), source=source)) == target.num_parameters()


def page() -> Any:
    """The script that writes what the documents take from the declarations."""
    spec = importlib.util.spec_from_file_location("families_page", ROOT / "docs" / "families_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_documents_have_the_families_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    script = page()
    monkeypatch.setattr(script, "FAMILIES", {name: f for name, f in FAMILIES.items() if name not in DECLARED})
    assert all(family.models for family in script.FAMILIES.values()), "which models are of it?"
    for document in script.PARTS:
        assert script.written(document) == (ROOT / document).read_text(encoding="utf-8"), "make docs"
    shown = (ROOT / script.SHOWN).read_text(encoding="utf-8")
    assert len(shown.splitlines()) < 60


SIZES_OF_UNITS: dict[Unit, int] = {"query_heads": 8, "kv_groups": 4, "head": 2, "intermediate": 3}


def test_fused_segments_follow_one_another():
    axis = Axis(("query_heads", "kv_groups", "kv_groups"))
    assert axis.size(SIZES_OF_UNITS) == 16
    kept = axis.kept({"query_heads": torch.tensor([4, 5]), "kv_groups": torch.tensor([2, 3])}, sizes=SIZES_OF_UNITS)
    assert kept is not None
    assert kept.tolist() == [4, 5, 8 + 2, 8 + 3, 12 + 2, 12 + 3]


def test_segments_that_take_turns_are_cut_group_by_group():
    """Each of two groups: two query heads of two entries, a key of two, a value of two."""
    axis = Axis(("query_heads", "kv_groups", "kv_groups"), by_group=True)
    labels = torch.tensor([0, 1, 2, 3, 100, 101, 200, 201, 4, 5, 6, 7, 102, 103, 202, 203])
    for unit, where in axis.places(SIZES_OF_UNITS):
        assert (labels[where] % 100).tolist() == list(range(SIZES_OF_UNITS[unit]))
    kept = axis.kept({"query_heads": torch.tensor([2, 3, 4, 5]), "kv_groups": torch.arange(4)}, sizes=SIZES_OF_UNITS)
    assert kept is not None
    assert labels[kept].tolist() == [2, 3, 100, 101, 200, 201, 4, 5, 102, 103, 202, 203]


def test_an_axis_that_nothing_cuts_is_left_alone():
    assert Axis(("intermediate",)).kept({"hidden": torch.arange(2)}, sizes=SIZES_OF_UNITS) is None
    stays = Axis(("intermediate", "head")).kept({"intermediate": torch.tensor([1])}, sizes=SIZES_OF_UNITS)
    assert stays is not None
    assert stays.tolist() == [1, 3, 4]
