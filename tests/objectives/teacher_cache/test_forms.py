"""What is kept of a distribution, and what comes of it: against plain formulas over whole distributions, in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from shearing.data.documents import IGNORED_LABEL
from shearing.models.anatomy import Head
from shearing.objectives.distilled import DistilledLoss, distilled_loss
from shearing.objectives.teacher_cache.cached_teacher import KeptTargets
from shearing.objectives.teacher_cache.draws import Draws
from shearing.objectives.teacher_cache.form import FORMS, Form, form_of
from shearing.objectives.teacher_cache.said import Said
from shearing.objectives.teacher_cache.top_k import TopK

SEQUENCES, POSITIONS, VOCABULARY = 3, 7, 53
ALL = [Draws(draws=50, seed=3), Draws(draws=1, seed=0), TopK(top_k=5), TopK(top_k=52)]


def _given() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCABULARY, (SEQUENCES, POSITIONS), generator=generator)
    labels.view(-1)[[0, 5, 20]] = IGNORED_LABEL
    return {
        "hidden": normal(SEQUENCES, POSITIONS, 16).requires_grad_(),
        "weight": normal(VOCABULARY, 16).requires_grad_(),
        "log_p": (2 * normal(SEQUENCES, POSITIONS, VOCABULARY)).log_softmax(-1),
        "labels": labels,
        "weights": torch.rand(SEQUENCES, POSITIONS, generator=generator, dtype=torch.float64),
    }


def _said(form: Form, given: dict[str, Tensor], *, domain: str = "books") -> list[Said]:
    """As an observer makes it of logits."""
    rows = []
    for row, log_p_SV in enumerate(given["log_p"]):
        p_SV = log_p_SV.exp()
        noise = torch.from_numpy(form.noise(domain, row, positions=POSITIONS))
        ids, values, rest = form.taken(p_SV.clone(), log_p_SV, noise)
        labels = given["labels"][row].clamp(min=0)[:, None]
        losses, entropies = -log_p_SV.gather(1, labels)[:, 0], -(p_SV * log_p_SV).sum(-1)
        kept = form.sorted_out(ids.numpy(), values.numpy())
        rows.append(Said(losses.numpy(), entropies.numpy(), *kept, rest.numpy()))
    return rows


def _ours(
    given: dict[str, Tensor], rows: list[Said], *, form: Form, chunk_tokens: int, by_label: bool
) -> DistilledLoss:
    return distilled_loss(
        given["hidden"],
        Head(given["weight"]),
        given["labels"],
        targets=KeptTargets(rows, form=form, device=torch.device("cpu")),
        weights_BS=given["weights"],
        temperature=1.0,
        by_label=by_label,
        chunk_tokens=chunk_tokens,
    )


def _divergences(form: Form, p: Tensor, q: Tensor, rows: list[Said]) -> Tensor:
    """From whole distributions [B, S, V], by what is kept of p."""
    if isinstance(form, Draws):
        shares = torch.zeros_like(p)
        for row, said in enumerate(rows):
            shares[row].scatter_add_(1, torch.from_numpy(said.ids), torch.from_numpy(said.values).double())
        return (p * p.log()).sum(-1) - (shares * q.log()).sum(-1)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter_(
        -1, p.argsort(-1)[..., -form.settings()["top_k"] :], value=True
    )

    def rest(distribution: Tensor) -> Tensor:
        return distribution.masked_fill(kept, 0.0).sum(-1)

    return (p * (p / q).log() * kept).sum(-1) + rest(p) * (rest(p) / rest(q)).log()


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.words)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
@pytest.mark.parametrize("by_label", [False, True])
def test_loss_and_gradients_are_those_of_whole_distributions(form: Form, chunk_tokens: int, by_label: bool) -> None:
    given = _given()
    rows = _said(form, given)
    logits = given["hidden"] @ given["weight"].T
    counted = given["labels"] != IGNORED_LABEL
    labels = given["labels"].where(counted, 0)[..., None]
    losses = -logits.log_softmax(-1).gather(-1, labels)[..., 0] * counted
    teacher_losses = -given["log_p"].gather(-1, labels)[..., 0] * counted
    divergences = _divergences(form, given["log_p"].exp(), logits.softmax(-1), rows) * counted
    weights = given["weights"] * counted * ((-teacher_losses).exp() if by_label else 1.0)
    total = ((1 - weights) * losses + weights * divergences).sum()
    found = _ours(given, rows, form=form, chunk_tokens=chunk_tokens, by_label=by_label)
    expected = {"total": total, "losses": losses, "teacher_losses": teacher_losses, "divergences": divergences}
    for name, value in {**expected, "weights": weights}.items():
        torch.testing.assert_close(getattr(found, name), value.detach(), rtol=1e-6, atol=1e-6, msg=name)
    inputs = (given["hidden"], given["weight"])
    for ours, theirs in zip(
        torch.autograd.grad(found.total / 7, inputs), torch.autograd.grad(total / 7, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ALL, ids=lambda form: form.words)
@pytest.mark.parametrize("vocab_size", [VOCABULARY, 49_152, 128_256, 262_144])
def test_rows_come_back_from_disk(form: Form, vocab_size: int) -> None:
    given = _given()
    for said in _said(form, given):
        said = said._replace(ids=said.ids + (said.values != 0) * (vocab_size - VOCABULARY))
        stored = form.encoded(said, vocab_size=vocab_size)
        back = form.decoded(stored, positions=POSITIONS, vocab_size=vocab_size)
        for name, array in said._asdict().items():
            assert np.array_equal(getattr(back, name), array.astype(np.float32) if name != "ids" else array), name
        assert form.encoded(back, vocab_size=vocab_size) == stored
        with pytest.raises(ValueError, match="bytes"):
            form.decoded(stored[:-4], positions=POSITIONS, vocab_size=vocab_size)
    assert form_of(form.settings()) == form


def test_every_form_is_tried() -> None:
    assert {form.name for form in ALL} == FORMS.keys()


@pytest.mark.parametrize(("vocab_size", "bits"), [(49_152, 16), (128_256, 17), (151_936, 18)])
def test_fifty_draws_take_the_bits_of_each_token_once(vocab_size: int, bits: int) -> None:
    form = Draws(draws=50, seed=0)
    said = _said(form, _given())[0]
    different = int((said.values > 0).sum())
    expected = POSITIONS * 8 + -(-POSITIONS * 49 // 8) + 2 * different + -(-different * (bits - 16) // 8)
    assert len(form.encoded(said, vocab_size=vocab_size)) == expected


def test_draws_are_a_function_of_seed_domain_and_row() -> None:
    form = Draws(draws=50, seed=3)
    first = form.noise("books", 4, positions=6)
    assert np.array_equal(first, form.noise("books", 4, positions=6))
    assert ((first >= 0) & (first < 1)).all()
    for other in (Draws(draws=50, seed=4).noise("books", 4, positions=6), form.noise("code", 4, positions=6)):
        assert not np.array_equal(first, other)
    assert not np.array_equal(first, form.noise("books", 5, positions=6))
    # The same positions of a longer row: the numbers of a position do not depend on the length.
    assert np.array_equal(first, form.noise("books", 4, positions=9)[:6])


def test_draws_follow_the_distribution() -> None:
    """Chi-square over a hundred thousand draws, within five standard deviations of its mean."""
    given = _given()
    p_V = given["log_p"][0, 0].exp()
    form = Draws(draws=250, seed=1)
    noise = torch.from_numpy(form.noise("books", 0, positions=400))
    ids, _, _ = form.taken(p_V.expand(400, -1), p_V.log().expand(400, -1), noise)
    counts = torch.bincount(ids.flatten(), minlength=VOCABULARY)
    expected = p_V * ids.numel()
    big = expected > 5
    square = ((counts - expected) ** 2 / expected)[big].sum().item()
    freedom = int(big.sum()) - 1
    assert abs(square - freedom) < 5 * (2 * freedom) ** 0.5


def test_one_token_that_is_sure_is_always_drawn() -> None:
    p_CV = torch.zeros(2, VOCABULARY)
    p_CV[0, 0] = p_CV[1, -1] = 1.0
    form = Draws(draws=20, seed=0)
    ids, _, _ = form.taken(p_CV, p_CV.log(), torch.from_numpy(form.noise("books", 0, positions=2)))
    assert ids.tolist() == [[0] * 20, [VOCABULARY - 1] * 20]


def test_gradients_of_draws_have_that_of_the_divergence_as_their_mean() -> None:
    given = _given()
    given["weights"].fill_(1.0)
    inputs = (given["hidden"], given["weight"])
    q = (given["hidden"] @ given["weight"].T).log_softmax(-1)
    counted = given["labels"] != IGNORED_LABEL
    kl = ((given["log_p"].exp() * (given["log_p"] - q)).sum(-1) * counted).sum()
    exact = [gradient.flatten() for gradient in torch.autograd.grad(kl, inputs)]
    samples = []
    for seed in range(400):
        form = Draws(draws=50, seed=seed)
        found = _ours(given, _said(form, given), form=form, chunk_tokens=8, by_label=False)
        gradients = torch.autograd.grad(found.total, inputs)
        samples.append(torch.cat([found.total.detach()[None], *(gradient.flatten() for gradient in gradients)]))
    drawn = torch.stack(samples)
    away, spread = drawn.mean(0) - torch.cat([kl.detach()[None], *exact]), drawn.std(0) / len(drawn) ** 0.5
    assert not away[spread == 0].any()  # tokens that do not count
    error = (away / spread)[spread > 0]
    # Standard errors of about 1,200 numbers: their mean square is 1, and none is far out.
    assert 0.5 < error.square().mean().item() < 1.6
    assert error.abs().max().item() < 5


def test_many_draws_come_near_to_the_divergence() -> None:
    given = _given()
    rows = _said(Draws(draws=256, seed=0), given)
    p, q = given["log_p"].exp(), (given["hidden"] @ given["weight"].T).softmax(-1)
    found = _divergences(Draws(draws=256, seed=0), p, q, rows).mean()
    assert found.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=0.05)
