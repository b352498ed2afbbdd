"""Estimators: planted wrong starts are overturned with the recipe's defaults, and what the masks of a step are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings as hypothesis_settings, strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.pruning.structured.estimators.straight_through import centred_ranks, reliability
from shearing.pruning.structured.importance.chance import random_scores
from shearing.pruning.structured.learner import MaskLearner
from shearing.pruning.structured.mask_settings import MaskSettings, doubts
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.pruning.structured.rounding import top_k
from shearing.runs.recipe import load_recipe
from tests.models.tiny import tiny_ids, tiny_model
from tests.repository import ROOT

DEMO = {"duration": "24 steps", "warmup": "33%", "freeze": "80%", "final_learning_rate": 1.0}
LONG = {"duration": "200 steps"}
BASE = Shape.of(tiny_model().config)


def source_of(**sizes: int) -> Shape:
    return dataclasses.replace(BASE, **sizes)


def learner_of(source: Shape, target: Shape, *, scores=None, names=("layers",), seed=0, **keys) -> MaskLearner:
    section = PruneRecipe.model_validate({"batch_size": "1 sequences", **keys})
    chosen = MaskSettings.of(section, tokens_per_step=1, seed=seed)
    return MaskLearner(names, source=source, target=target, settings=chosen, scores=scores)


ROWS = {
    # Name of a granularity, sizes of source and target: rows of 3, 9, 30, 576 and 1,536 units.
    "3 KV groups": (
        "kv_groups",
        source_of(num_attention_heads=3, num_key_value_heads=3),
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        DEMO,
    ),
    "9 query heads": (
        "query_heads",
        source_of(num_attention_heads=9, num_key_value_heads=1),
        {"num_attention_heads": 6},
        DEMO,
    ),
    "30 layers": ("layers", source_of(num_hidden_layers=30), {"num_hidden_layers": 20}, DEMO),
    "576 dimensions": ("hidden", source_of(hidden_size=576), {"hidden_size": 480}, LONG),
    "1,536 units": ("intermediate", source_of(intermediate_size=1536), {"intermediate_size": 1024}, LONG),
}


def planted(name: str, *, noise: float, **changes) -> tuple[float, float]:
    """Learns from a loss that is linear in the masks, from a start that has every row upside down.

    Args:
        name: of a row.
        noise: standard deviation of a step's gradient, in standard deviations of what it says.

    Returns:
        The share of the truly best units that the start keeps, and that masks keep in the end.
    """
    granularity, source, smaller, keys = ROWS[name]
    worth = centred_ranks(random_scores(source, seed=7)[granularity])
    scores = random_scores(source, seed=0) | {granularity: -worth}
    target = dataclasses.replace(source, **smaller)
    subject = learner_of(source, target, scores=scores, names=[granularity], **{**keys, **changes})
    truth = top_k(worth, keep=subject.granularities[0].target)
    generator = torch.Generator().manual_seed(0)

    def found() -> float:
        masks = subject.final_masks()
        kept = masks.attention if granularity == "layers" else getattr(masks, granularity)
        return float((kept * truth).sum() / truth.sum())

    before = found()
    for step in range(subject.settings.freeze_step):
        z = subject.sample(step=step, draw=0)
        z = z.attention if granularity == "layers" else getattr(z, granularity)
        gradient = worth + noise * worth.std() * torch.randn(worth.shape, generator=generator)
        (subject.penalty(step=step) - (z * gradient).sum() / worth.shape[-1]).backward()
        subject.optimizer_step(step=step)
    return before, found()


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_start_is_overturned_with_the_recipes_defaults(name):
    before, after = planted(name, noise=0.0)
    assert before < 0.81
    assert after == 1.0


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_start_is_overturned_by_noisy_gradients_too(name):
    before, after = planted(name, noise=0.5)
    assert before < 0.81
    assert after > 0.9


@pytest.mark.parametrize("name", ["30 layers", "1,536 units"])
def test_what_chance_says_does_not_overturn_a_start(name):
    before, after = planted(name, noise=100.0)
    assert after == pytest.approx(before, abs=0.05)


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.data())
def test_rows_add_up_to_their_target_at_every_step_and_are_binary_in_the_end(units, data):
    keep = data.draw(st.integers(1, units - 1))
    ramp = data.draw(st.sampled_from([0, 5]))
    source = source_of(intermediate_size=units)
    target = dataclasses.replace(source, intermediate_size=keep)
    keys = {"duration": "12 steps", "sparsity_warmup": ramp, "freeze": "2 steps"}
    scores = random_scores(source, seed=data.draw(st.integers(0, 9)))
    subject = learner_of(source, target, scores=scores, names=["intermediate"], **keys)
    for step in range(12):
        z = subject.sample(step=step, draw=0).intermediate
        wanted = round(subject.targets(step=step)["intermediate"]) if step < 10 else keep
        torch.testing.assert_close(z.sum(-1), torch.full((4,), float(max(1, wanted))), rtol=0, atol=1e-4)
        assert ((z >= 0) & (z <= 1)).all()
        assert step < 10 or set(z.unique().tolist()) <= {0.0, 1.0}
        if z.requires_grad:
            z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(step)))
        subject.optimizer_step(step=step)
    assert torch.equal(subject.masks_at(step=9).intermediate, z) == torch.equal(subject.final_masks().intermediate, z)
    assert {row["rounding_gap"] for row in subject.summary().values()} == {0}
    assert {row["largest_violation"] for row in subject.summary().values()} == {0.0}


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_centred_ranks_are_the_share_below_less_the_share_above(values):
    row = torch.tensor([values], dtype=torch.float32)
    others = max(1, len(values) - 1)
    expected = [(sum(v > o for o in values) - sum(v < o for o in values)) / others for v in values]
    torch.testing.assert_close(centred_ranks(row), torch.tensor([expected]), rtol=0, atol=1e-6)


def test_reliability_is_one_less_the_variance_of_the_means_over_what_they_differ_by():
    generator = torch.Generator().manual_seed(0)
    worth = torch.randn(40, generator=generator)
    votes = worth + 2 * torch.randn(25, 40, generator=generator)
    votes -= votes.mean(-1, keepdim=True)
    noise = votes.var(0, correction=1).mean() / 25
    expected = 1 - noise / votes.mean(0).square().mean()
    found = reliability(votes.sum(0), votes.square().sum(0), steps=torch.tensor(25.0))
    assert 0.5 < float(expected) < 1
    torch.testing.assert_close(found, expected)
    one = votes[0]
    assert float(reliability(one, one.square(), steps=torch.tensor(1.0))) == 0.0
    assert float(reliability(3 * one, 3 * one.square(), steps=torch.tensor(3.0))) == pytest.approx(1.0)
    zero = torch.zeros(5)
    assert float(reliability(zero, zero, steps=torch.tensor(3.0))) in (0.0, 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt_neox-in-turn"])
def test_closed_units_of_a_real_model_have_a_gradient(family):
    model = tiny_model(family)
    source = Shape.of(model.config)
    smaller = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 16, "num_attention_heads": 2}
    target = dataclasses.replace(source, **smaller, num_key_value_heads=2)
    names = ["layers", "kv_groups", "query_heads", "intermediate", "hidden"]
    names = [name for name in names if name != "query_heads" or source.query_heads_per_group > 1]
    subject = learner_of(source, target, scores=random_scores(source, seed=0), names=names, duration="10 steps")
    wrapped = MaskedModel(model)
    last = subject.settings.freeze_step - 1
    masks = subject.sample(step=last, draw=0)
    wrapped.set_masks(masks)
    wrapped(tiny_ids()).square().mean().backward()
    alive = masks.attention > 0
    closed = {name: (getattr(masks, name) == 0) for name in names[1:]} | {"layers": ~alive}
    closed["kv_groups"] &= alive[:, None]
    if "query_heads" in closed:
        closed["query_heads"] &= (alive[:, None] & (masks.kv_groups > 0))[..., None]
    closed["intermediate"] &= alive[:, None]
    for name, units in closed.items():
        assert units.any(), name
        assert (subject.log_alpha[name].grad[units] != 0).all(), name


def trained_on_counting() -> tuple[LlamaForCausalLM, Callable[[int, int], Tensor]]:
    """A model that has learned to go on with arithmetic progressions modulo 24, and sequences of them by seed."""

    def sequences(seed: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        first, stride = (torch.randint(low, 24, (count, 1), generator=generator) for low in (0, 1))
        return (first + stride * torch.arange(17)) % 24

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95), fused=True)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1.0, step / 20) * (1 - step / 300)
        tokens = sequences(step, 32)
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False), sequences


@pytest.mark.slow
def test_masks_of_a_trained_model_find_from_any_start_what_exhaustive_search_finds():
    """Which two of four layers: all six pairs are measured, and each is a start; weights stay as they are."""
    model, sequences = trained_on_counting()
    wrapped = MaskedModel(model)
    heldout = sequences(1_000_000, 64)

    def loss(pair: Tensor) -> float:
        wrapped.set_masks(Masks(attention=pair, mlp=pair))
        with torch.no_grad():
            return float(model(heldout, labels=heldout).loss)

    pairs = [torch.tensor([float(layer in pair) for layer in range(4)]) for pair in combinations(range(4), 2)]
    losses = {tuple(pair.tolist()): loss(pair) for pair in pairs}
    best = sorted(losses, key=losses.__getitem__)
    source = Shape.of(model.config)
    target = dataclasses.replace(source, num_hidden_layers=2)
    learned = []
    for pair in pairs:
        scores = random_scores(source, seed=0) | {"layers": pair}
        subject = learner_of(source, target, scores=scores, **LONG)
        for step in range(subject.settings.freeze_step):
            wrapped.set_masks(subject.sample(step=step, draw=0))
            tokens = sequences(2_000 + step, 16)
            model(tokens, labels=tokens).loss.backward()
            subject.optimizer_step(step=step)
        learned.append(tuple(subject.final_masks().attention.tolist()))
    # The two best pairs are equal to a hundredth of a nat, the next one is not.
    assert losses[best[1]] - losses[best[0]] < 0.01 < 0.2 < losses[best[2]] - losses[best[1]]
    assert set(learned) <= set(best[:2])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({}, []),
        ({"freeze": "100%"}, []),
        ({"estimator": "hard_concrete"}, []),
        ({"estimator": "hard_concrete", "mask_learning_rate": 0.01, "duration": "24 steps"}, ["hardly any unit"]),
        ({"initial_masks": "open"}, ["without sparsity_warmup"]),
        ({"initial_masks": "open", "sparsity_warmup": "20%"}, []),
        (
            {
                "estimator": "hard_concrete",
                "initial_masks": "open",
                "sparsity_warmup": "20%",
                "mask_learning_rate": 1.0,
            },
            ["chance"],
        ),
    ],
)
def test_keys_that_contradict_each_other_are_said(keys, said):
    section = PruneRecipe.model_validate({"batch_size": 1, "duration": "3200 steps", **keys})
    chosen = MaskSettings.of(section, tokens_per_step=1, seed=0)
    found = list(doubts(chosen, opens=section.initial_masks == "open"))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


@pytest.mark.parametrize("name", ["sheared-llama-1.3b", "sheared-llama-2.7b", "llama-3.2-1.2b", "budget", "demo"])
def test_no_recipe_of_ours_contradicts_itself(name):
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    tokens = recipe.pruning.prune.tokens_per_step(sequence_length=recipe.data.sequence_length)
    chosen = MaskSettings.of(recipe.pruning.prune, tokens_per_step=tokens, seed=0)
    assert not list(doubts(chosen, opens=recipe.pruning.prune.initial_masks == "open"))
