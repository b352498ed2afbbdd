"""The first test of the project: masked forward == compacted forward."""

from __future__ import annotations

import dataclasses
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.models.cutting import Selection, compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.models.stored.saving import write_model
from shearing.pruning.structured.granularities import granularities_of
from tests.models.moments import require_moments_of_the_cut
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

GRANULARITIES = ("layers", "kv_groups", "query_heads", "intermediate", "hidden")
SUBSETS = [subset for size in range(1, 6) for subset in combinations(GRANULARITIES, size)]
SUBLAYERS = [("sublayers",), ("sublayers", "hidden", "intermediate")]


def subsets_of(family: str) -> list[tuple[str, ...]]:
    """Granularities that a family allows together."""
    source = Shape.of(CONFIGS[family]())
    found = [*SUBSETS, *([] if source.family.parallel else SUBLAYERS)]
    if follows_width(source):
        found = [names for names in found if "hidden" in names or not {"kv_groups", "query_heads"} & set(names)]
    return found


def follows_width(source: Shape) -> bool:
    """Whether heads and width are cut together: in those of the tiny configs alone whose heads are as wide as they."""
    return source.hidden_size == source.num_attention_heads * source.head_dim


def random_mask(size: tuple[int, ...], *, keep: int, fractional: bool, generator: torch.Generator) -> Tensor:
    """Exactly `keep` nonzero units a row."""
    order = torch.rand(size, generator=generator).argsort(-1)[..., :keep]
    mask = torch.zeros(size).scatter_(-1, order, 1.0)
    return mask * (0.05 + 0.95 * torch.rand(size, generator=generator)) if fractional else mask


def masks_and_target(source: Shape, granularities, *, fractional: bool, seed: int) -> tuple[Masks, Shape]:
    generator = torch.Generator().manual_seed(seed)
    L, K, G = source.num_hidden_layers, source.num_key_value_heads, source.query_heads_per_group
    keep_groups = 2 if "kv_groups" in granularities else K
    keep_heads = max(1, G - 1) if "query_heads" in granularities else G
    width = keep_groups * keep_heads * source.head_dim if follows_width(source) else 24
    target = dataclasses.replace(
        source,
        num_hidden_layers=2 if {"layers", "sublayers"} & set(granularities) else L,
        hidden_size=width if "hidden" in granularities else source.hidden_size,
        intermediate_size=17 if "intermediate" in granularities else source.intermediate_size,
        num_attention_heads=keep_groups * keep_heads,
        num_key_value_heads=keep_groups,
    )

    def draw(size: tuple[int, ...], keep: int) -> Tensor:
        return random_mask(size, keep=keep, fractional=fractional, generator=generator)

    fields: dict[str, Tensor] = {}
    if "layers" in granularities:
        fields["attention"] = fields["mlp"] = draw((L,), 2)
    if "sublayers" in granularities:
        # Attention of layers 0 and 2, MLP of layers 1 and 3: pairs from different layers, alternating in depth.
        fields["attention"] = torch.tensor([1.0, 0.0, 1.0, 0.0]) * (0.5 if fractional else 1.0)
        fields["mlp"] = torch.tensor([0.0, 1.0, 0.0, 1.0]) * (0.7 if fractional else 1.0)
    if "kv_groups" in granularities:
        fields["kv_groups"] = draw((L, K), keep_groups)
    if "query_heads" in granularities:
        fields["query_heads"] = draw((L, K, G), keep_heads)
    if "intermediate" in granularities:
        fields["intermediate"] = draw((L, source.intermediate_size), 17)
    if "hidden" in granularities:
        fields["hidden"] = draw((source.hidden_size,), width)
    return Masks(**fields), target


@torch.no_grad()
def relative_difference(family: str, granularities, *, tied: bool, fractional: bool, seed: int) -> float:
    model = tiny_model(family, tied=tied, seed=seed)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, granularities, fractional=fractional, seed=seed)
    masked = MaskedModel(model)
    masked.set_masks(masks)
    expected = masked.model(tiny_ids(seed=seed)).logits
    small = compact(masked.release(), masks=masks, selection=Selection.of(masks, source=source, target=target))
    assert Shape.of(small.config) == target
    assert sum(p.numel() for p in small.parameters()) == target.num_parameters()
    return float((small(tiny_ids(seed=seed)).logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("fractional", [False, True], ids=["binary", "fractional"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", CONFIGS)
def test_masked_equals_compacted_for_every_family(family, tied, fractional):
    assert relative_difference(family, GRANULARITIES, tied=tied, fractional=fractional, seed=1) < 1e-5


EVERY_SUBSET = ("qwen3", "phi3", "gpt_neox", "gpt_neox-in-turn", "smollm3", "olmo3", "gemma2")


@pytest.mark.parametrize(
    ("family", "granularities"), [(family, subset) for family in EVERY_SUBSET for subset in subsets_of(family)]
)
def test_masked_equals_compacted_for_every_subset_of_granularities(family, granularities):
    assert relative_difference(family, granularities, tied=True, fractional=True, seed=2) < 1e-5


@settings(max_examples=40, deadline=None)
@given(
    chosen=st.sampled_from(sorted(CONFIGS)).flatmap(
        lambda family: st.tuples(st.just(family), st.sampled_from(subsets_of(family)))
    ),
    tied=st.booleans(),
    fractional=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_masked_equals_compacted_property(chosen, tied, fractional, seed):
    family, granularities = chosen
    assert relative_difference(family, granularities, tied=tied, fractional=fractional, seed=seed) < 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_the_result_is_an_ordinary_checkpoint(family, tmp_path):
    model = tiny_model(family, tied=family != "qwen2")
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=False, seed=3)
    small = compact(model, masks=masks, selection=Selection.of(masks, source=source, target=target))
    small.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids = tiny_ids()
    torch.testing.assert_close(loaded(ids).logits, small(ids).logits, rtol=0, atol=0)
    assert loaded.config.rope_parameters == model.config.rope_parameters
    generated, again = (
        loaded.generate(ids, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert generated.shape == (2, 20)
    assert torch.equal(generated, again)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "llama-biases", "llama-rope-scaling"])
def test_heads_that_llama_refuses_are_exact_in_the_nearest_architecture(family, tied, tmp_path):
    """Three heads of a width of 25, as transformers alone opens them."""
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=True, seed=4)
    hidden = random_mask((36,), keep=25, fractional=True, generator=torch.Generator().manual_seed(4))
    heads = torch.zeros(4, 3, 2)
    heads[..., 1] = 0.7
    masks = dataclasses.replace(masks, hidden=hidden, kv_groups=None, query_heads=heads)
    target = dataclasses.replace(target, hidden_size=25, num_attention_heads=3, num_key_value_heads=3)
    masked = MaskedModel(model)
    masked.set_masks(masks)
    with torch.no_grad():
        expected = masked.model(tiny_ids()).logits
    small = compact(masked.release(), masks=masks, selection=Selection.of(masks, source=source, target=target))
    assert small.config.model_type == ("seed_oss" if family == "llama-biases" else "mistral")
    write_model(small, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    found = loaded(tiny_ids()).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert loaded.config.rope_parameters == model.config.rope_parameters
    assert loaded.generate(tiny_ids(), max_new_tokens=4, do_sample=False).shape == (2, 20)
    for name in ("hidden_act", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_sublayers_out_of_order_are_refused():
    model = tiny_model()
    source = Shape.of(model.config)
    masks = Masks(attention=torch.tensor([0.0, 1, 0, 1]), mlp=torch.tensor([1.0, 0, 1, 0]))
    with pytest.raises(ShearingError, match="alternate"):
        Selection.of(masks, source=source, target=dataclasses.replace(source, num_hidden_layers=2))


def test_sublayers_of_different_layers_are_refused_where_they_read_the_same():
    model = tiny_model("gpt_neox")
    source = Shape.of(model.config)
    masks = Masks(attention=torch.tensor([1.0, 0, 1, 0]), mlp=torch.tensor([0.0, 1, 0, 1]))
    with pytest.raises(ShearingError, match="whole layers"):
        Selection.of(masks, source=source, target=dataclasses.replace(source, num_hidden_layers=2))
    with pytest.raises(ShearingError, match=r"granularities=\[layers, hidden\]"):
        granularities_of(["sublayers", "hidden"], source=source, target=None)


def test_masks_of_another_size_are_refused():
    source = Shape.of(tiny_model().config)
    masks = Masks(hidden=torch.ones(36))
    with pytest.raises(ShearingError, match="hidden dimensions"):
        Selection.of(masks, source=source, target=dataclasses.replace(source, hidden_size=24))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", CONFIGS)
def test_moments_of_the_cut_model_are_those_it_would_have_had(family, tied):
    """The gradient of the masked model, cut like its weights, is the gradient of the cut model."""
    model = tiny_model(family, tied=tied)
    source = Shape.of(model.config)
    masks, target = masks_and_target(source, GRANULARITIES, fractional=False, seed=1)
    selection = Selection.of(masks, source=source, target=target)
    require_moments_of_the_cut(model, masks=masks, selection=selection)
