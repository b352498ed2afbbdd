"""Activation matching against plain formulas in fp64, with autograd's gradients; masked and cut, and what acts when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import DocumentRules
from shearing.models.anatomy import backbone
from shearing.models.correspondence import Correspondence
from shearing.models.cutting import Selection, compact
from shearing.models.masked import MaskedModel, Masks
from shearing.models.shape import Shape
from shearing.objectives.distillation import Distillation
from shearing.objectives.hidden import HiddenMatching
from shearing.objectives.objective import Losses, Origins
from shearing.training.device import checkpoint_activations
from tests.models.tiny import SIZES, VOCAB_SIZE, tiny_model
from tests.objectives.distillations import parts_of, tiny_distillation

TOKENS_BT = torch.randint(VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(2))
ORIGINS = Origins(domains=torch.tensor([0, 1, 1, 0]))
LAYERS, HIDDEN, STEPS = SIZES["num_hidden_layers"], SIZES["hidden_size"], 10
SOURCE = Correspondence.of_source(num_layers=LAYERS)


def _masks(*, binary: bool = False, dtype: torch.dtype = torch.float32) -> Masks:
    """Of 2 layers, 24 dimensions and 20 units, with the values that masks have while they are learned."""
    generator = torch.Generator().manual_seed(5)

    def rows(count: int, size: int, kept: int) -> Tensor:
        values = torch.zeros(count, size, dtype=dtype)
        for row in values:
            chosen = torch.randperm(size, generator=generator)[:kept]
            row[chosen] = 1.0 if binary else 0.5 + torch.rand(kept, generator=generator, dtype=torch.float64).to(dtype)
        return values

    layers = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=dtype) * (1.0 if binary else 0.8)
    intermediate = rows(LAYERS, SIZES["intermediate_size"], 20)
    return Masks(hidden=rows(1, HIDDEN, 24)[0], attention=layers, mlp=layers, intermediate=intermediate)


def _cut(model: PreTrainedModel, masks: Masks) -> tuple[PreTrainedModel, Selection]:
    source = Shape.of(model.config)
    target = Shape.of(tiny_model(num_hidden_layers=2, hidden_size=24, intermediate_size=20).config)
    selection = Selection.of(masks, source=source, target=target)
    return compact(model, masks=masks, selection=selection), selection


def _streams(model: PreTrainedModel, tokens_BS: Tensor) -> list[Tensor]:
    """Behind each layer but the last, which Hugging Face gives after its norm."""
    states = backbone(model)(input_ids=tokens_BS, use_cache=False, output_hidden_states=True).hidden_states
    return list(states[1:-1])


def _loss(objective: Distillation) -> Losses:
    losses: Losses = objective.train()(TOKENS_BT, None, ORIGINS)
    return losses


@pytest.mark.parametrize("masked", [False, True])
def test_errors_and_their_gradient_are_those_of_the_formula_in_fp64(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    own, taught = (
        [torch.randn(2, 5, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(LAYERS)] for _ in range(2)
    )
    masks = _masks(dtype=torch.float64) if masked else Masks()
    correspondence = Correspondence(layers=tuple(range(LAYERS)), masks=lambda: masks)
    matching = HiddenMatching(tiny_model(), teacher=tiny_model(), correspondence=correspondence)
    inputs = [stream.requires_grad_() for stream in own]
    found = matching.errors(own, teacher=taught)
    kept = [place for place in range(HIDDEN) if not masked or masks.hidden[place] > 0]
    expected = torch.zeros(2, 5, dtype=torch.float64)
    layers = [1, 3] if masked else list(range(LAYERS))
    for layer in layers:
        for row in range(2):
            for token in range(5):
                apart = sum((own[layer][row, token, i] - taught[layer][row, token, i]) ** 2 for i in kept)
                expected[row, token] = expected[row, token] + apart / len(layers) / sum(
                    taught[layer][row, token, i] ** 2 for i in kept
                )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.rand(2, 5, generator=generator, dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad((weights * value).sum(), inputs, allow_unused=True, materialize_grads=True)
        for value in (found, expected)
    )
    for mine, of_formula in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, of_formula, rtol=1e-12, atol=1e-12)


def test_the_loss_of_a_model_is_that_of_the_formula() -> None:
    """Gradients to what norms, which are fp32 in every model, leave of fp64."""
    layers, counted = [0, 2], torch.ones(4, 8)
    student, teacher = (tiny_model(seed=seed).double() for seed in (0, 1))
    objective = tiny_distillation(
        model=student,
        teacher=teacher,
        weight=0.3,
        domains={"first": 1.0, "second": 0.25},
        hidden={"weight": 0.7, "layers": layers},
        hidden_steps=STEPS,
        correspondence=SOURCE,
    )
    found = _loss(objective)
    plain = _loss(tiny_distillation(model=student, teacher=teacher, weight=0.3, domains={"first": 1.0, "second": 0.25}))
    own, taught = (_streams(model, TOKENS_BT[:, :-1]) for model in (student, teacher))
    relative = [((own[at] - taught[at]) ** 2).sum(-1) / (taught[at] ** 2).sum(-1) for at in layers]
    errors_BS = (relative[0] + relative[1]) / 2 * counted
    expected = plain.total + 0.7 * (errors_BS.sum(1) * torch.tensor([1.0, 0.25, 0.25, 1.0])).sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.measured[:, 3], errors_BS.sum(1).detach(), rtol=1e-9, atol=1e-9)
    parameters = list(student.parameters())
    of_formula = torch.autograd.grad(expected, parameters)
    for ours, theirs in zip(torch.autograd.grad(found.total, parameters), of_formula, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_under_masks_too_with_the_gradient_of_the_masks() -> None:
    """What is closed does not count, and that it does not is no way for a mask to lower the loss."""
    masks, teacher = _masks(dtype=torch.float64), tiny_model(seed=1).double()
    values = {name: mask.requires_grad_() for name, mask in masks.tensors().items()}
    masked = MaskedModel(tiny_model().double())
    masked.set_masks(masks)
    settings = {"model": masked.model, "teacher": teacher, "weight": 0.3}
    parts = {"hidden_steps": STEPS, "correspondence": Correspondence.of_masked(masked)}
    found = _loss(tiny_distillation(hidden={"weight": 0.7}, **settings, **parts)).total
    own, taught = (_streams(model, TOKENS_BT[:, :-1]) for model in (masked.model, teacher))
    kept = [place for place, value in enumerate(masks.hidden.tolist()) if value]
    own, taught = ([stream[..., kept] for stream in streams] for streams in (own, taught))
    relative = [((a - b) ** 2).sum(-1) / (b**2).sum(-1) for a, b in zip(own, taught, strict=True)]
    # Of layers 1 and 3, which are open, Hugging Face gives the last one's stream behind the final norm only.
    only = tiny_distillation(hidden={"weight": 0.7, "layers": [0, 1, 2]}, **settings, **parts)
    expected = _loss(tiny_distillation(hidden=None, **settings)).total + 0.7 * relative[1].sum()
    ours = _loss(only).total
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert found.item() != pytest.approx(ours.item(), rel=1e-3)
    inputs = [*masked.model.parameters(), *values.values()]
    of_formula = torch.autograd.grad(expected, inputs, retain_graph=True)  # of the masks' products
    for mine, theirs in zip(torch.autograd.grad(ours, inputs), of_formula, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layers", ["all", [1, 2]])
@pytest.mark.parametrize("binary", [False, True])
def test_masked_and_cut_are_as_far_from_the_teacher(binary: bool, layers: Any) -> None:
    masks, teacher = _masks(binary=binary), tiny_model(seed=1)
    small, selection = _cut(tiny_model(), masks)
    masked = MaskedModel(tiny_model())
    masked.set_masks(masks)
    found = []
    for model, correspondence in (
        (masked.model, Correspondence.of_masked(masked)),
        (small, Correspondence.of_cut(selection)),
    ):
        settings = {"model": model, "teacher": teacher, "correspondence": correspondence, "hidden_steps": STEPS}
        losses = _loss(tiny_distillation(weight=0.4, hidden={"weight": 0.5, "layers": layers}, **settings))
        found.append((losses.total, losses.measured))
    for masked_value, cut_value in zip(*found, strict=True):
        torch.testing.assert_close(masked_value, cut_value, rtol=1e-5, atol=1e-4)
    assert found[0][1][:, 3].min() > 0.1


def test_a_student_that_is_its_teacher_under_masks_is_apart_by_what_is_gone() -> None:
    masked = MaskedModel(tiny_model())
    settings = {"model": masked.model, "teacher": tiny_model(), "correspondence": Correspondence.of_masked(masked)}
    objective = tiny_distillation(hidden={}, hidden_steps=STEPS, **settings)
    assert _loss(objective).measured[:, 3].abs().max() < 1e-9
    masked.set_masks(_masks())
    assert _loss(objective).measured[:, 3].min() > 0.1


@pytest.mark.parametrize("selective", [False, True])
def test_recomputed_layers_give_the_same_gradients(selective: bool) -> None:
    gradients = []
    for recomputed in (False, True):
        student = tiny_model()
        if recomputed:
            checkpoint_activations(student, selective=selective)
        objective = tiny_distillation(model=student, hidden={}, hidden_steps=STEPS, correspondence=SOURCE)
        gradients.append(torch.autograd.grad(_loss(objective).total, list(student.parameters())))
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))


def test_the_weight_falls_linearly_and_what_is_measured_goes_on() -> None:
    settings = {"correspondence": SOURCE, "teacher": tiny_model(seed=1)}
    objective = tiny_distillation(hidden={"weight": 0.5}, hidden_steps=STEPS, **settings)
    terms, plain = [], _loss(tiny_distillation(hidden=None, **settings)).total
    for step in (0, 5, 10, 11):
        objective.begin_step(step)
        losses = _loss(objective)
        terms.append((losses.total - plain).item() / losses.measured[:, 3].sum().item())
    assert terms == pytest.approx([0.5, 0.25, 0.0, 0.0], abs=1e-6)


def test_only_tokens_that_count_and_domains_that_listen() -> None:
    settings = {"correspondence": SOURCE, "teacher": (teacher := tiny_model(seed=1)), "domains": ["second"]}
    objective = tiny_distillation(hidden={"weight": 1.0}, hidden_steps=STEPS, weight=0.0, **settings).train()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 4)
    rules = DocumentRules(attention_within=False, loss_across=False)
    documents = rules.documents(positions, device=torch.device("cpu"))
    losses = objective(TOKENS_BT, documents, ORIGINS)
    own, taught = (_streams(model, TOKENS_BT[:, :-1]) for model in (objective.model, teacher))
    plain = tiny_distillation(weight=0.0, domains=["second"]).train()(TOKENS_BT, documents, ORIGINS)
    torch.testing.assert_close(losses.total - plain.total, losses.measured[1:3, 3].sum(), rtol=1e-4, atol=1e-3)
    some = tiny_distillation(hidden={"layers": [0]}, hidden_steps=STEPS, **settings).train()
    found = some(TOKENS_BT, documents, ORIGINS).measured[:, 3]
    relative_BS = ((own[0] - taught[0]) ** 2).sum(-1) / (taught[0] ** 2).sum(-1)
    torch.testing.assert_close(found, (relative_BS * (positions[:, 1:] != 0)).sum(1), rtol=1e-5, atol=1e-5)


def test_layers_that_were_not_kept_say_nothing() -> None:
    masks = _masks()
    small, selection = _cut(tiny_model(), masks)
    masked = MaskedModel(tiny_model())
    masked.set_masks(masks)
    for model, correspondence in (
        (small, Correspondence.of_cut(selection)),
        (masked.model, Correspondence.of_masked(masked)),
    ):
        parts = parts_of(model=model, correspondence=correspondence, hidden={"layers": [0, 2]}, hidden_steps=STEPS)
        assert _loss(Distillation.of(parts)).measured[:, 3].tolist() == [0.0] * 4


def test_hooks_are_gone_after_a_step() -> None:
    objective = tiny_distillation(hidden={}, hidden_steps=STEPS, correspondence=SOURCE, teacher=(other := tiny_model()))
    _loss(objective)
    assert not any(module._forward_hooks for model in (objective, other) for module in model.modules())
