from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shearing.models.anatomy import Head
from shearing.objectives.cross_entropy import causal_lm_loss, per_token_loss

IGNORED = -100


def _inputs(dtype: torch.dtype, *, sequences: int = 3, positions: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sequences, positions, 16, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(53, 16, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(53, (sequences, positions), generator=generator)
    return hidden, weight, labels


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.T).flatten(0, 1).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(logits, labels.flatten(), reduction="sum", ignore_index=IGNORED)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("ignored", [0, 5, 21])
def test_loss_and_gradients_equal_cross_entropy(
    chunk_tokens: int, dtype: torch.dtype, tolerance: float, ignored: int
) -> None:
    hidden, weight, labels = _inputs(dtype)
    labels.view(-1)[torch.randperm(21, generator=torch.Generator().manual_seed(1))[:ignored]] = IGNORED
    expected = _reference(hidden, weight, labels)
    expected_gradients = torch.autograd.grad(expected / 7, (hidden, weight))

    loss = causal_lm_loss(hidden, Head(weight), labels, chunk_tokens=chunk_tokens)[0]
    gradients = torch.autograd.grad(loss / 7, (hidden, weight))

    assert loss.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
    for gradient, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("divisor", "cap"), [(8.0, None), (1.0, 3.0), (0.5, 3.0)])
def test_heads_that_scale_and_cap_have_the_gradients_of_their_logits(divisor: float, cap: float | None) -> None:
    """Granite's and Gemma's, with their own order of operations."""
    hidden, weight, labels = _inputs(torch.float64)
    labels[0, 3] = IGNORED
    logits = (hidden @ weight.T) / divisor
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    head = Head(weight, divisor, cap)
    torch.testing.assert_close(head.logits(hidden), logits)
    loss, losses = causal_lm_loss(hidden, head, labels, chunk_tokens=4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(per_token_loss(hidden, head, labels, chunk_tokens=5), losses)
    found, wanted = (torch.autograd.grad(each / 7, (hidden, weight)) for each in (loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


def test_tied_weights_collect_both_gradients() -> None:
    torch.manual_seed(0)
    embedding, layer = nn.Embedding(53, 16, dtype=torch.float64), nn.Linear(16, 16, dtype=torch.float64)
    tokens = torch.randint(53, (2, 9))
    gradients = []
    for chunked in (True, False):
        hidden = layer(embedding(tokens[:, :-1]))
        labels = tokens[:, 1:]
        if chunked:
            loss = causal_lm_loss(hidden, Head(embedding.weight), labels, chunk_tokens=3)[0]
        else:
            loss = _reference(hidden, embedding.weight, labels)
        gradients.append(torch.autograd.grad(loss, (embedding.weight, layer.weight)))
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-12, atol=1e-12)


def test_frozen_inputs_get_no_gradient() -> None:
    hidden, weight, labels = _inputs(torch.float64)
    causal_lm_loss(hidden, Head(weight.detach()), labels, chunk_tokens=4)[0].backward()
    expected = torch.autograd.grad(_reference(hidden, weight, labels), hidden)[0]
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, expected)
    with torch.no_grad():
        assert not causal_lm_loss(hidden, Head(weight), labels, chunk_tokens=4)[0].requires_grad


def test_bf16_autocast_keeps_softmax_and_sums_in_fp32() -> None:
    hidden, weight, labels = _inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = causal_lm_loss(hidden, Head(weight), labels, chunk_tokens=4)[0]
    loss.backward()
    logits = (hidden.detach().bfloat16() @ weight.detach().bfloat16().T).float().flatten(0, 1).requires_grad_()
    expected = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    expected.backward()
    assert loss.dtype == torch.float32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert logits.grad is not None
    torch.testing.assert_close(weight.grad, logits.grad.T @ hidden.detach().flatten(0, 1), rtol=0.02, atol=0.05)
    torch.testing.assert_close(hidden.grad.flatten(0, 1), logits.grad @ weight.detach(), rtol=0.02, atol=0.05)


def test_backward_runs_once_and_says_so() -> None:
    hidden, weight, labels = _inputs(torch.float32)
    loss = causal_lm_loss(hidden, Head(weight), labels, chunk_tokens=4)[0]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()


def test_per_token_loss_equals_cross_entropy() -> None:
    hidden, weight, labels = _inputs(torch.float64)
    labels[0, 3] = IGNORED
    losses = per_token_loss(hidden, Head(weight), labels, chunk_tokens=4)
    expected = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    ).view(labels.shape)
    torch.testing.assert_close(losses, expected.detach())
    assert losses[0, 3] == 0
    assert not losses.requires_grad


@pytest.mark.parametrize("ignored", [False, True])
def test_the_loss_of_each_token_comes_with_their_sum(ignored: bool) -> None:
    hidden, weight, labels = _inputs(torch.float64)
    if ignored:
        labels[0, 3] = IGNORED
    total, losses = causal_lm_loss(hidden, Head(weight), labels, chunk_tokens=4)
    torch.testing.assert_close(losses, per_token_loss(hidden, Head(weight), labels, chunk_tokens=5))
    torch.testing.assert_close(losses.sum(), total)
    assert not losses.requires_grad
