"""What layers are worth in random company: the sampler against all subnetworks there are."""

from __future__ import annotations

import itertools

import pytest
import torch

from shearing.data.documents import Inputs
from shearing.models.anatomy import Head
from shearing.pruning.structured.importance.depth.shapley import ShapleyLike, gram_of, logit_distances
from shearing.pruning.structured.importance.metric import Evidence
from tests.models.tiny import tiny_ids, tiny_model
from tests.pruning.structured.importance.depth.oracle import loss_of, shortened

TEXT = [Inputs(tiny_ids(length=8))]


def mean_logit_distance(model, without) -> float:
    with torch.no_grad():
        whole, short = (
            m(input_ids=TEXT[0].tokens, use_cache=False).logits for m in (model, shortened(model, without=without))
        )
    return float((whole - short).norm(dim=-1).mean())


@pytest.mark.parametrize("harm", ["loss", "logits"])
def test_it_converges_to_the_mean_over_all_halves(harm: str) -> None:
    model = tiny_model()
    of = {
        gone: loss_of(shortened(model, without=gone), TEXT) if harm == "loss" else mean_logit_distance(model, gone)
        for gone in itertools.combinations(range(4), 2)
    }
    exact = torch.tensor(
        [
            sum(value for gone, value in of.items() if layer in gone) / 3
            - sum(value for gone, value in of.items() if layer not in gone) / 3
            for layer in range(4)
        ]
    )
    scores = ShapleyLike(harm=harm, pairs=300).scores(model, evidence=Evidence(text=TEXT, seed=1))
    spread = max(of.values()) - min(of.values())
    torch.testing.assert_close(scores["layers"], exact, atol=0.1 * spread, rtol=0.0)
    one = ShapleyLike(harm=harm, pairs=1).scores(model, evidence=Evidence(text=TEXT, seed=1))
    assert (one["layers"] - exact).abs().max() > (scores["layers"] - exact).abs().max()


def test_the_seed_says_which_subnetworks() -> None:
    first, again, other = (
        ShapleyLike(parts="sublayers", pairs=2).scores(tiny_model(), evidence=Evidence(text=TEXT, seed=seed))
        for seed in (3, 3, 4)
    )
    for name in ("attention", "mlp"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_distances_of_logits_need_no_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, whole, hidden = (torch.randn(size, generator=generator) for size in ((50, 6), (2, 3, 6), (2, 3, 6)))
    for head in (Head(weight), Head(weight, divisor=8.0), Head(weight, cap=3.0), Head(weight, divisor=0.5, cap=3.0)):
        gram = None if head.cap else gram_of(head)
        expected = (head.logits(whole) - head.logits(hidden)).norm(dim=-1)
        torch.testing.assert_close(logit_distances(whole, hidden, head=head, gram=gram), expected)
