"""Distillation as an objective: which token listens how much, and what is measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from shearing.data.documents import DocumentRules
from shearing.models.anatomy import backbone, head_weight
from shearing.models.attention import keep_attention_within_documents
from shearing.objectives.objective import Losses, Origins, objective_of
from shearing.objectives.trust import DomainTrust
from tests.models.tiny import VOCAB_SIZE, tiny_model
from tests.objectives.distillations import parts_of, tiny_distillation

TOKENS_BT = torch.randint(VOCAB_SIZE, (4, 9), generator=torch.Generator().manual_seed(2))
ORIGINS = Origins(domains=torch.tensor([0, 1, 1, 0]))
MEASURES = ("teacher_losses", "divergences", "teacher_weights")


def _logits(model: Any, tokens_BS: Tensor, **keywords: Any) -> Tensor:
    hidden = backbone(model)(input_ids=tokens_BS, use_cache=False, **keywords).last_hidden_state
    return hidden @ head_weight(model).T


def _train(**settings: Any) -> Losses:
    losses: Losses = tiny_distillation(**settings).train()(TOKENS_BT, None, ORIGINS)
    return losses


def test_the_loss_of_a_batch_is_that_of_plain_formulas() -> None:
    losses = _train(weight=0.3, temperature=2.0)
    student, teacher = (_logits(tiny_model(seed=seed), TOKENS_BT[:, :-1]) for seed in (0, 1))
    labels = TOKENS_BT[:, 1:, None]
    ce, teacher_ce = (-values.log_softmax(-1).gather(2, labels)[..., 0] for values in (student, teacher))
    p, q = ((values / 2.0).softmax(-1) for values in (teacher, student))
    kl = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.total, (0.7 * ce + 0.3 * 4.0 * kl).sum(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses.rows, ce.sum(1), rtol=1e-5, atol=1e-4)
    expected = torch.stack([teacher_ce, kl, torch.full_like(kl, 0.3)], 2).sum(1)
    torch.testing.assert_close(losses.measured, expected, rtol=1e-5, atol=1e-4)


def test_a_smaller_teacher_of_other_depth_and_width_will_do() -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=VOCAB_SIZE, **sizes, num_key_value_heads=1, head_dim=16)
    teacher = AutoModelForCausalLM.from_config(config)
    losses = _train(teacher=teacher, weight=1.0)
    expected = -_logits(teacher, TOKENS_BT[:, :-1]).log_softmax(-1).gather(2, TOKENS_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses.measured[:, 0], expected.sum(1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("domains", "weights"), [("all", [0.5, 0.5]), (["second"], [0.0, 0.5]), ({"first": 0.2}, [0.1, 0.0])]
)
def test_domains_listen_as_they_are_told(domains: Any, weights: list[float]) -> None:
    losses = _train(domains=domains, weight=0.5)
    of_rows = losses.measured[:, MEASURES.index("teacher_weights")] / losses.labels
    assert of_rows.tolist() == pytest.approx([weights[domain] for domain in ORIGINS.domains.tolist()])


def test_the_weight_follows_the_learning_rate() -> None:
    for schedule, height, weight in (("constant", 0.2, 0.5), ("learning_rate", 0.2, 0.1), ("learning_rate", 0.0, 0.0)):
        objective = tiny_distillation(schedule=schedule, height=height, weight=0.5).train()
        objective.begin_step(3)
        losses = objective(TOKENS_BT, None, ORIGINS)
        assert (losses.measured[:, 2] / losses.labels).tolist() == pytest.approx([weight] * 4)


def test_tokens_of_low_entropy_learn_from_the_text_alone() -> None:
    losses = _train(weight=1.0, skip_low_entropy=0.5)
    assert losses.measured[:, 2].tolist() == [4.0] * 4
    student, teacher = (_logits(tiny_model(seed=seed), TOKENS_BT[:, :-1]).log_softmax(-1) for seed in (0, 1))
    ce = -student.gather(2, TOKENS_BT[:, 1:, None])[..., 0]
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    entropies = -(teacher.exp() * teacher).sum(-1)
    sure = entropies <= entropies.sort(1).values[:, 3:4]
    torch.testing.assert_close(losses.total, torch.where(sure, ce, kl).sum(), rtol=1e-5, atol=1e-4)


def test_the_probability_of_the_label_weighs() -> None:
    losses = _train(weight=0.5, by_label=True)
    teacher = _logits(tiny_model(seed=1), TOKENS_BT[:, :-1]).softmax(-1).gather(2, TOKENS_BT[:, 1:, None])[..., 0]
    torch.testing.assert_close(losses.measured[:, 2], 0.5 * teacher.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("within", [False, True])
def test_the_teacher_sees_the_documents_that_the_student_sees(within: bool) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 4)
    rules = DocumentRules(attention_within=within, loss_across=False)
    documents = rules.documents(positions, device=torch.device("cpu"))
    parts = parts_of(weight=0.4, teacher=(teacher := tiny_model(seed=1)))
    if within:
        keep_attention_within_documents(parts.model)
        keep_attention_within_documents(teacher)
    losses = objective_of("distillation", parts=parts).train()(TOKENS_BT, documents, ORIGINS)
    assert losses.labels.tolist() == [6] * 4
    stretches = [(0, 4), (4, 7), (7, 8)] if within else [(0, 8)]
    ce = kl = torch.zeros(())
    for first, end in stretches:
        part = slice(first, end)
        student, taught = (
            _logits(tiny_model(seed=seed), TOKENS_BT[:, :-1][:, part]).log_softmax(-1) for seed in (0, 1)
        )
        counts = positions[:, 1:][:, part] != 0
        ce = ce - (student.gather(2, TOKENS_BT[:, 1:][:, part, None])[..., 0] * counts).sum()
        kl = kl + ((taught.exp() * (taught - student)).sum(-1) * counts).sum()
    torch.testing.assert_close(losses.total, 0.6 * ce + 0.4 * kl, rtol=1e-5, atol=1e-4)


def test_trust_falls_where_the_teacher_is_no_better() -> None:
    trust = DomainTrust(4, margin=0.5, device=torch.device("cpu"))
    assert trust.factors().tolist() == [1.0] * 4
    labels = torch.tensor([10.0, 20.0, 10.0, 0.0]).double()
    student = torch.tensor([40.0, 80.0, 40.0, 0.0]).double()
    teacher = student - labels * torch.tensor([1.0, 0.2, -0.3, 0.0])
    trust.add(student, teacher_M=teacher, labels_M=labels)
    assert trust.factors().tolist() == pytest.approx([1.0, 0.4, 0.0, 1.0])
    before = trust.state()
    trust.add(student * float("nan"), teacher_M=teacher, labels_M=labels)
    assert trust.state() == before
    # A domain that a step has nothing of keeps its trust; what comes now weighs more than what was.
    trust.add(*(torch.zeros(4).double(),), teacher_M=torch.zeros(4).double(), labels_M=torch.zeros(4).double())
    assert trust.factors().tolist() == pytest.approx([1.0, 0.4, 0.0, 1.0])
    trust.add(student, teacher_M=student, labels_M=labels)
    assert trust.factors()[0].item() == pytest.approx(0.81 / 1.81 / 0.5)


def test_an_objective_that_trusts_by_domain_remembers_and_continues() -> None:
    objective = tiny_distillation(domains="auto", weight=0.5, margin=0.25).train()
    assert objective.follows_domains
    losses = objective(TOKENS_BT, None, ORIGINS)
    rows = torch.column_stack([losses.rows, losses.labels, losses.measured]).double()
    domains = torch.stack([rows[ORIGINS.domains == domain].sum(0) for domain in (0, 1)])
    domains[0, 0] = domains[0, 2] + 0.05 * domains[0, 1]  # 0.05 nats above its teacher
    domains[1, 0] = domains[1, 2] - domains[1, 1]
    objective.end_step(domains)
    again = tiny_distillation(domains="auto", weight=0.5, margin=0.25).train()
    again.recall(json.loads(json.dumps(objective.memory())))
    for each in (objective, again):
        losses = each(TOKENS_BT, None, ORIGINS)
        assert (losses.measured[:, 2] / losses.labels).tolist() == pytest.approx([0.1, 0.0, 0.0, 0.1], abs=1e-6)
    assert again.memory() == objective.memory()
