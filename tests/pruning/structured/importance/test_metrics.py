"""Importance metrics: each scores every unit of every family, and a new one is a file and a line."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from shearing.data.documents import DocumentRules, Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.granularities import unit_sizes
from shearing.pruning.structured.importance.activations import Activations
from shearing.pruning.structured.importance.chance import Chance
from shearing.pruning.structured.importance.depth.shapley import ShapleyLike
from shearing.pruning.structured.importance.learned.hard_budget import HardBudget
from shearing.pruning.structured.importance.learned.policy_gradient import PolicyGradient
from shearing.pruning.structured.importance.magnitude import Magnitude
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import EVERYTHING, METRICS, complete_metrics, metric_of
from shearing.pruning.structured.recipe import PruneRecipe
from shearing.pruning.structured.rounding import select
from shearing.runs.stages.evaluation.recipe import EvaluationRecipe
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_every_unit_of_every_family(name: str, family: str) -> None:
    model = tiny_model(family)
    source = Shape.of(model.config)
    target = dataclasses.replace(source, num_hidden_layers=3, intermediate_size=20, hidden_size=24)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    text = [Inputs(tiny_ids(seed=seed)) for seed in range(2)] if METRICS[name].reads_text else []
    evidence = Evidence(text=text, target=target, seed=3)
    calls: list[int] = []
    gives = METRICS[name].gives
    scores = metric_of(name).scores(model, evidence=evidence, advance=calls.append)
    sizes = {granularity: size for granularity, size in unit_sizes(source).items() if granularity in gives}
    assert {granularity: tuple(values.shape) for granularity, values in scores.items()} == sizes
    assert all(values.isfinite().all() and values.dtype == torch.float32 for values in scores.values())
    assert all(len(values.unique()) > 1 for values in scores.values() if values.shape[-1] > 1)
    assert calls == [1] * metric_of(name).units_of_work(source, evidence=evidence)
    cost = metric_of(name).cost(source, evidence=evidence)
    assert (cost.forward_tokens > 0) == bool(text)
    rest = {} if gives == EVERYTHING else Magnitude().scores(model, evidence=evidence)
    _, selection = select({**rest, **scores}, source=source, target=target)
    assert selection.shape(source) == target
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def batches(size: int) -> list[Inputs]:
    """Six sequences, so many at a time, with more labels in one than in the other."""
    tokens, positions = tiny_ids(sequences=6), torch.ones(6, 17, dtype=torch.int64)
    for row in range(6):
        positions[row, 1 : 1 + 2 * row] = 0
    documents = DocumentRules(loss_across=False).documents(positions, device=torch.device("cpu"))
    whole = Inputs(tokens, documents)
    return [whole.part(first, min(first + size, 6)) for first in range(0, 6, size)]


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_minds_how_many_sequences_pass_through_at_a_time(name: str) -> None:
    model = tiny_model()
    source = Shape.of(model.config)
    target = dataclasses.replace(source, num_hidden_layers=3, intermediate_size=20, hidden_size=24)
    found, chosen = [], []
    for size in (4, 1, 2, 3):
        evidence = Evidence(text=batches(size) if METRICS[name].reads_text else [], target=target, seed=3)
        calls: list[int] = []
        found.append(metric_of(name).scores(model, evidence=evidence, advance=calls.append))
        assert len(calls) == metric_of(name).units_of_work(source, evidence=evidence)
        rest = {} if METRICS[name].gives == EVERYTHING else Magnitude().scores(model, evidence=evidence)
        chosen.append(select({**rest, **found[-1]}, source=source, target=target)[1].digest)
    assert len(set(chosen)) == 1
    # AdamW makes whole steps out of gradients that are next to nothing.
    rtol, atol = (1e-3, 1e-4) if name.startswith("hard_budget") else (1e-4, 1e-6)
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=rtol, atol=atol)


def test_steps_hold_no_more_than_a_batch_in_memory_at_a_time() -> None:
    model, seen = tiny_model(), set[int]()
    model.get_input_embeddings().register_forward_hook(lambda _module, _arguments, output: seen.add(output.shape[0]))
    for metric in (PolicyGradient(epochs=1), HardBudget(epochs=1), ShapleyLike(pairs=1)):
        metric.scores(model, evidence=Evidence(text=batches(1)))
    assert seen == {1}


@pytest.mark.parametrize("name", [name for name, facts in METRICS.items() if facts.reads_text])
def test_a_metric_that_reads_text_scores_nothing_without_any(name: str) -> None:
    model = tiny_model()
    target = dataclasses.replace(Shape.of(model.config), num_hidden_layers=2)
    with pytest.raises(ShearingError) as raised:
        metric_of(name).scores(model, evidence=Evidence(target=target))
    assert raised.value.field == "calibration_tokens"


def test_recipes_take_the_names_of_the_registry() -> None:
    assert get_args(PruneRecipe.model_fields["initial_masks"].annotation) == ("open", *complete_metrics())
    (each,) = get_args(EvaluationRecipe.model_fields["baselines"].annotation)
    names = get_args(get_args(each)[0])
    assert names == (*complete_metrics(), *(f"{name}+refit" for name in complete_metrics()))
    assert {"random", "magnitude", "activations", "reconstruction"} <= set(complete_metrics())
    assert all(facts.gives <= EVERYTHING for facts in METRICS.values())


def test_chance_goes_by_the_seed() -> None:
    first, again, other = (Chance().scores(tiny_model(), evidence=Evidence(seed=seed)) for seed in (0, 0, 1))
    for name, values in first.items():
        assert torch.equal(values, again[name])
        assert not torch.equal(values, other[name])


def test_activations_find_planted_units():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5:].mul_(1e-3)
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.v_proj.weight[8:].mul_(1e-3)
        model.model.layers[2].mlp.down_proj.weight.zero_()
    scores = Activations().scores(model, evidence=Evidence(text=[Inputs(tiny_ids(seed=seed)) for seed in range(3)]))
    assert (scores["intermediate"].topk(5, dim=-1).indices.sort(-1).values == torch.arange(5)).all()
    assert (scores["kv_groups"].argmax(-1) == 0).all()
    assert int(scores["layers"].argmin()) == 2
    assert {name: tuple(value.shape) for name, value in scores.items()} == unit_sizes(Shape.of(model.config))


def test_activations_are_the_same_however_text_comes_in_batches():
    model, text = tiny_model("llama"), tiny_ids(sequences=4)
    text[3] = text[3, 0]  # unlike the others, which a short last batch would give more weight
    found = [
        Activations().scores(model, evidence=Evidence(text=[Inputs(part) for part in text.split(size)]))
        for size in (4, 3, 1)
    ]
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=1e-5, atol=1e-7)


def test_magnitude_finds_planted_units():
    model = tiny_model("qwen2", tied=False)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_proj.weight[7].mul_(10)
        model.model.embed_tokens.weight[:, 3].mul_(100)
    scores = Magnitude().scores(model, evidence=Evidence())
    assert (scores["intermediate"].argmax(-1) == 7).all()
    assert int(scores["hidden"].argmax()) == 3
