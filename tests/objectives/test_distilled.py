"""The mixed loss and every divergence against plain formulas over whole logits, in fp64, with autograd's gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shearing.data.documents import IGNORED_LABEL
from shearing.models.anatomy import Head
from shearing.objectives.chunked import Scratch
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.objectives.distilled import DistilledLoss, distilled_loss, without_low_entropy
from shearing.objectives.divergences import divergence_of
from shearing.objectives.registry import DIVERGENCES
from shearing.objectives.teacher import LogitTargets

SEQUENCES, POSITIONS, VOCABULARY, KEPT = 3, 7, 53, 5


def _top_k(p: Tensor, q: Tensor) -> Tensor:
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.argsort(-1)[..., -KEPT:], value=True)

    def merged(distribution: Tensor) -> Tensor:
        rest = distribution.masked_fill(kept, 0.0).sum(-1, keepdim=True)
        return torch.cat([distribution[kept].view(*distribution.shape[:-1], KEPT), rest], -1)

    return (merged(p) * (merged(p) / merged(q)).log()).sum(-1)


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: (p * (p / q).log()).sum(-1),
    "reverse_kl": lambda p, q: (q * (q / p).log()).sum(-1),
    "jsd": lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum(-1) / 2,
    "top_k": _top_k,
}
"""From probabilities [.., V] of the teacher and of the student, as the papers have them."""


def _inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(VOCABULARY, (SEQUENCES, POSITIONS), generator=generator)
    labels.view(-1)[[0, 5, 20]] = IGNORED_LABEL  # the first, one inside, and the last
    return {
        "hidden": normal(SEQUENCES, POSITIONS, 16).requires_grad_(),
        "weight": normal(VOCABULARY, 16).requires_grad_(),
        "teacher_hidden": normal(SEQUENCES, POSITIONS, 24),  # of another width
        "teacher_weight": normal(VOCABULARY, 24) / 2,
        "labels": labels,
        "weights": torch.rand(SEQUENCES, POSITIONS, generator=generator, dtype=torch.float64).to(dtype),
    }


def _ours(
    given: dict[str, Tensor],
    *,
    kind: str,
    temperature: float,
    by_label: bool,
    chunk_tokens: int,
    divisor: float = 1.0,
    cap: float | None = None,
) -> DistilledLoss:
    targets = LogitTargets(
        given["teacher_hidden"],
        Head(given["teacher_weight"], divisor, cap),
        divergence=divergence_of(kind, top_k=KEPT),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    return distilled_loss(
        given["hidden"],
        Head(given["weight"], divisor, cap),
        given["labels"],
        targets=targets,
        weights_BS=given["weights"],
        temperature=temperature,
        by_label=by_label,
        chunk_tokens=chunk_tokens,
    )


def _reference(
    given: dict[str, Tensor],
    *,
    kind: str,
    temperature: float,
    by_label: bool,
    divisor: float = 1.0,
    cap: float | None = None,
) -> dict[str, Tensor]:
    logits = given["hidden"] @ given["weight"].T / divisor
    teacher_logits = given["teacher_hidden"] @ given["teacher_weight"].T / divisor
    if cap is not None:
        logits, teacher_logits = ((each / cap).tanh() * cap for each in (logits, teacher_logits))
    counted = given["labels"] != IGNORED_LABEL
    labels = given["labels"].where(counted, 0)[..., None]
    losses = -logits.log_softmax(-1).gather(-1, labels)[..., 0] * counted
    teacher_losses = -teacher_logits.log_softmax(-1).gather(-1, labels)[..., 0] * counted
    p, q = ((values / temperature).softmax(-1) for values in (teacher_logits, logits))
    divergences = REFERENCES[kind](p, q) * counted
    weights = given["weights"] * counted * ((-teacher_losses).exp() if by_label else 1.0)
    total = ((1 - weights) * losses + weights * temperature**2 * divergences).sum()
    return {
        "total": total,
        "losses": losses,
        "teacher_losses": teacher_losses,
        "divergences": divergences,
        "weights": weights,
    }


def test_every_divergence_has_a_reference() -> None:
    assert REFERENCES.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 1000])  # 4: the last chunk is ragged
@pytest.mark.parametrize("by_label", [False, True])
def test_loss_and_gradients_are_those_of_the_formulas(
    kind: str, temperature: float, chunk_tokens: int, by_label: bool
) -> None:
    given = _inputs()
    expected = _reference(given, kind=kind, temperature=temperature, by_label=by_label)
    found = _ours(given, kind=kind, temperature=temperature, by_label=by_label, chunk_tokens=chunk_tokens)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value.detach(), rtol=1e-9, atol=1e-9, msg=name)
    inputs = (given["hidden"], given["weight"])
    of_formula = torch.autograd.grad(expected["total"] / 7, inputs)
    for ours, theirs in zip(torch.autograd.grad(found.total / 7, inputs), of_formula, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("divisor", "cap"), [(8.0, None), (1.0, 3.0)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_heads_that_scale_and_cap_teach_and_learn_by_their_logits(
    divisor: float, cap: float | None, temperature: float
) -> None:
    given = _inputs()
    way: dict[str, Any] = {"kind": "forward_kl", "temperature": temperature, "by_label": True}
    expected = _reference(given, **way, divisor=divisor, cap=cap)
    found = _ours(given, **way, divisor=divisor, cap=cap, chunk_tokens=4)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value.detach(), rtol=1e-9, atol=1e-9, msg=name)
    inputs = (given["hidden"], given["weight"])
    of_formula = torch.autograd.grad(expected["total"] / 7, inputs)
    torch.testing.assert_close(torch.autograd.grad(found.total / 7, inputs), of_formula, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_products_in_bf16_stay_near_the_formulas(kind: str) -> None:
    given = _inputs(torch.float32)
    exact = {name: value.detach().double() if value.is_floating_point() else value for name, value in given.items()}
    exact["hidden"].requires_grad_()
    expected = _reference(exact, kind=kind, temperature=1.0, by_label=False)
    given["teacher_hidden"], given["teacher_weight"] = (
        given[name].bfloat16() for name in ("teacher_hidden", "teacher_weight")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _ours(given, kind=kind, temperature=1.0, by_label=False, chunk_tokens=4)
    assert found.total.dtype == torch.float32
    assert found.total.item() == pytest.approx(expected["total"].item(), rel=0.02)
    gradient = torch.autograd.grad(found.total, given["hidden"])[0].flatten().double()
    reference = torch.autograd.grad(expected["total"], exact["hidden"])[0].flatten()
    assert F.cosine_similarity(gradient, reference, dim=0).item() > 0.999


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_autocast_leaves_divergences_alone(kind: str) -> None:
    torch.manual_seed(0)
    log_q, log_p = (torch.randn(4, 50).log_softmax(-1) for _ in range(2))

    def found() -> tuple[Tensor, Tensor]:
        gradient = log_p.clone()
        return divergence_of(kind, top_k=5)(log_q.clone(), gradient, Scratch()), gradient

    expected = found()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # where it is on, products of fp32 are bf16's
        for ours, theirs in zip(found(), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_weight_0_is_cross_entropy_and_a_teacher_like_the_student_teaches_nothing() -> None:
    given = _inputs()
    given["weights"] = torch.zeros_like(given["weights"])
    found = _ours(given, kind="forward_kl", temperature=1.0, by_label=False, chunk_tokens=4)
    expected, losses = causal_lm_loss(given["hidden"], Head(given["weight"]), given["labels"], chunk_tokens=4)
    assert torch.equal(found.losses, losses)
    for ours, theirs in zip(
        torch.autograd.grad(found.total, (given["hidden"], given["weight"])),
        torch.autograd.grad(expected, (given["hidden"], given["weight"])),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    given["weights"] = torch.ones_like(given["weights"])
    given["teacher_hidden"], given["teacher_weight"] = given["hidden"].detach(), given["weight"].detach()
    for kind in DIVERGENCES:
        found = _ours(given, kind=kind, temperature=1.5, by_label=False, chunk_tokens=4)
        torch.testing.assert_close(found.divergences, torch.zeros_like(found.divergences), rtol=0, atol=1e-12)
        gradient = torch.autograd.grad(found.total, given["hidden"])[0]
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_a_tail_of_nearly_nothing_is_finite() -> None:
    log_q = torch.tensor([[0.0, 0.0, -300.0, -310.0]]).log_softmax(-1)
    log_p = torch.tensor([[0.0, 0.0, -2.0, -3.0]]).log_softmax(-1)
    q, gradient = log_q.clone(), log_p.clone()
    assert divergence_of("top_k", top_k=2)(q, gradient, Scratch()).isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.sum().item() == pytest.approx(0.0, abs=1e-5)


def test_entropies_and_what_they_leave_out() -> None:
    given = _inputs()
    targets = LogitTargets(
        given["teacher_hidden"],
        Head(given["teacher_weight"]),
        divergence=divergence_of("forward_kl", top_k=KEPT),
        temperature=2.0,
        chunk_tokens=4,
    )
    p = (given["teacher_hidden"] @ given["teacher_weight"].T).softmax(-1)
    entropies = targets.entropies().view(SEQUENCES, POSITIONS)
    torch.testing.assert_close(entropies, -(p * p.log()).sum(-1))

    counted = given["labels"] != IGNORED_LABEL
    weights = torch.full_like(entropies, 0.5)
    kept = without_low_entropy(weights, entropies_BS=entropies, counted_BS=counted, share=0.4)
    for row in range(SEQUENCES):
        places = sorted(counted[row].nonzero()[:, 0].tolist(), key=lambda place: entropies[row, place].item())
        left_out = places[: int(0.4 * len(places))]
        assert left_out
        assert (kept[row] == 0).nonzero()[:, 0].tolist() == sorted(left_out)
        assert (kept[row][kept[row] > 0] == 0.5).all()
