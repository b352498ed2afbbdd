"""A rotated model computes what it did; what a tied head loses is what least squares leave."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shearing.data.documents import Inputs
from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of, backbone
from shearing.models.families import LAYER, QUERY_HEADS, Axis, Norm, linear
from shearing.models.families.llama import LLAMA
from shearing.models.shape import Shape
from shearing.models.stored.paging.on_demand import on_demand
from shearing.models.stored.saving import write_model
from shearing.models.stored.stored_model import open_source
from shearing.processes.processes import Processes
from shearing.pruning.rotation.basis import Basis, fitted_gain, require_rotatable, rotate
from shearing.pruning.rotation.components import principal_basis
from shearing.pruning.rotation.tied import config_as_cut, require_place_for_gain, untie
from shearing.pruning.rotation.written import write_rotated
from shearing.pruning.structured.recipe import PruneRecipe
from tests.distributed.harness import spawn
from tests.models.experts import expert_configs
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

BATCHES = [Inputs(tiny_ids(sequences=3, seed=seed), None) for seed in range(2)]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", CONFIGS)
def test_a_rotated_model_computes_the_same(family: str) -> None:
    model = tiny_model(family, tied=False)
    try:
        require_rotatable(anatomy_of(model))
    except ShearingError as error:
        pytest.skip(error.allowed)
    wanted = model(tiny_ids()).logits
    assert rotate(model, principal_basis(model, BATCHES)) == 0.0
    assert relative(model(tiny_ids()).logits, wanted) < 1e-5
    if family == "llama":
        names = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")
        gains = [weight for name, weight in model.named_parameters() if name.endswith(names)]
        assert len(gains) == 9
        assert all(bool((gain == 1).all()) for gain in gains)


def test_components_are_ranked_and_apart() -> None:
    """The second moment of what norms read is diagonal in the new basis, largest first; a loud token weighs no more."""
    model = tiny_model("llama", tied=False)
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[3] *= 1e4  # a token like a sink
    basis = principal_basis(model, BATCHES)
    assert relative(basis.rotation.T @ basis.rotation, torch.eye(len(basis.rotation), dtype=torch.float64)) < 1e-12
    seen = []
    layers = [
        layer for layer in model.model.layers for layer in (layer.input_layernorm, layer.post_attention_layernorm)
    ]
    for norm in [*layers, model.model.norm]:
        norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, 1).double()))
    for batch in BATCHES:
        backbone(model)(**batch.keywords())
    rows = torch.cat(seen)
    rows = rows / rows.square().mean(dim=1, keepdim=True).sqrt()
    moment = basis.rotation.T @ rows.T @ rows @ basis.rotation
    values = moment.diagonal()
    assert relative(moment, values.diag()) < 1e-5
    assert bool((values[:-1] >= values[1:] * (1 - 1e-6)).all())


def test_the_gain_of_a_tied_head_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    head, wanted, normed = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((30, 6), (6, 6), (50, 6))
    )
    gain, lost = fitted_gain(head.T @ head, wanted=wanted, moment=normed.T @ normed / 50)
    # E (A - diag g) n for all tokens at once, as one system for g.
    system = np.concatenate([(head * row).numpy() for row in normed])
    aimed_at = np.concatenate([(head @ wanted @ row).numpy() for row in normed])
    expected, left, *_ = np.linalg.lstsq(system, aimed_at)
    assert gain.numpy() == pytest.approx(expected, rel=1e-6)
    assert lost == pytest.approx(np.sqrt(left[0] / (aimed_at**2).sum()), rel=1e-6)


def test_a_tied_model_loses_what_is_said() -> None:
    model = tiny_model("llama", tied=True)
    before = copy.deepcopy(model)
    lost = rotate(model, principal_basis(model, BATCHES))
    logits = [torch.cat([each(**batch.keywords()).logits for batch in BATCHES]) for each in (model, before)]
    assert 0 < lost < 0.5
    assert relative(logits[0], logits[1]) == pytest.approx(lost, rel=1e-3)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    # With one gain for all dimensions nothing is lost.
    even = tiny_model("llama", tied=True)
    with torch.no_grad():
        even.model.norm.weight.fill_(0.7)
    wanted = even(tiny_ids()).logits
    assert rotate(even, principal_basis(even, BATCHES)) < 1e-6
    assert relative(even(tiny_ids()).logits, wanted) < 1e-5


@pytest.mark.parametrize(
    ("family", "tied", "stays"),
    [("llama", True, True), ("qwen2", True, False), ("granite", False, False), ("qwen3_moe", False, False)],
)
def test_it_is_written_from_its_files_as_in_memory(family: str, tied: bool, stays: bool, tmp_path: Path) -> None:
    with expert_configs():
        model = tiny_model(family, tied=tied)
    write_model(model, tmp_path / "model")
    source = open_source(str(tmp_path / "model"), revision=None, converted=tmp_path / "converted")
    paged = on_demand(source, device=torch.device("cpu"))
    basis = principal_basis(paged, BATCHES)
    torch.testing.assert_close(basis.moment, principal_basis(model, BATCHES).moment)
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = tied and stays
    lost = write_rotated(paged, basis, tmp_path / "rotated", config=config)
    if tied and not stays:
        untie(model)
    wanted = model(tiny_ids()).logits
    assert rotate(model, basis) == lost
    assert stays or relative(model(tiny_ids()).logits, wanted) < 1e-5
    written = type(model).from_pretrained(tmp_path / "rotated")
    for (name, ours), (_, theirs) in zip(written.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.slow
def test_several_processes_find_the_same_basis(tmp_path: Path) -> None:
    spawn(_find, size=2, folder=tmp_path / "out")


def _find() -> None:
    with Processes.start(device="cpu") as processes:
        model, calls = tiny_model("llama", tied=False), []
        batches = [Inputs(tiny_ids(sequences=3, seed=seed), None) for seed in range(3)]
        found = principal_basis(model, batches, advance=calls.append, processes=processes)
        assert sum(calls) == 3 or not processes.is_main
        alone = principal_basis(model, batches)
        torch.testing.assert_close(found.moment, alone.moment, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(found.rotation, alone.rotation, rtol=0, atol=1e-3)
        assert all(torch.equal(each, found.rotation) for each in processes.gather(found.rotation))


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_an_untied_model_is_rotated_without_loss(family: str) -> None:
    """The head takes the last gain; a matrix of its own is all that it costs."""
    model = tiny_model(family, tied=True)
    before, wanted = Shape.of(model.config), model(tiny_ids()).logits
    untie(model)
    assert torch.equal(model(tiny_ids()).logits, wanted)
    assert rotate(model, principal_basis(model, BATCHES)) == 0.0
    assert relative(model(tiny_ids()).logits, wanted) < 1e-5
    after = Shape.of(model.config)
    assert after.num_parameters() == sum(each.numel() for each in model.parameters())
    assert after.num_parameters() - before.num_parameters() == before.vocab_size * before.hidden_size
    untie(model)  # nothing is left to do
    assert Shape.of(model.config) == after


def test_a_tied_source_is_rotated_only_at_its_price() -> None:
    config = tiny_model("llama", tied=True).config
    source = Shape.of(config)
    prune = PruneRecipe(duration="1 steps", batch_size=1, learning_rate=1e-3, rotate="pca")
    with pytest.raises(ShearingError, match=r"head that is the embedding.*\n.*rotate_tied") as refused:
        require_place_for_gain(source, prune=prune, target=None)
    assert f"{source.vocab_size * source.hidden_size:,} parameters more" in str(refused.value)
    assert config_as_cut(config, prune=prune) is config
    require_place_for_gain(replace(source, tied=False), prune=prune, target=None)
    require_place_for_gain(source, prune=prune.model_copy(update={"rotate": "none"}), target=None)
    require_place_for_gain(source, prune=prune.model_copy(update={"rotate_tied": "diagonal"}), target=source)

    unties = prune.model_copy(update={"rotate_tied": "untie"})
    as_cut = Shape.of(config_as_cut(config, prune=unties))
    assert as_cut == replace(source, tied=False)
    assert config.tie_word_embeddings
    require_place_for_gain(source, prune=unties, target=replace(as_cut, hidden_size=source.hidden_size // 2))
    with pytest.raises(ShearingError, match=f"fewer than the source's {source.num_parameters():,}"):
        require_place_for_gain(source, prune=unties, target=as_cut)


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ({"after": Norm("post")}, "between a write and the residual stream"),
        ({"before": Norm("pre", kind=LAYER)}, "mean over coordinates"),
        ({"before": Norm("pre", bias=True)}, "have a bias"),
        ({"linears": linear("strange", Axis(("hidden", "hidden")), QUERY_HEADS)}, "strange.weight has hidden"),
    ],
)
def test_families_that_forbid_it_are_told(attention: dict[str, Any], says: str) -> None:
    family = replace(LLAMA, attention=replace(LLAMA.attention, **attention))
    with pytest.raises(ShearingError, match=says):
        require_rotatable(family)


def test_a_basis_may_be_any_orthogonal_matrix() -> None:
    model = tiny_model("qwen2", tied=False)
    d = model.config.hidden_size
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    wanted = model(tiny_ids()).logits
    rotate(model, Basis(rotation=rotation, moment=torch.eye(d, dtype=torch.float64)))
    assert relative(model(tiny_ids()).logits, wanted) < 1e-5
