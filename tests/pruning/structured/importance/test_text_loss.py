"""The loss that metrics go by is the language model's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from shearing.data.documents import DocumentRules, Inputs
from shearing.errors import ShearingError
from shearing.models.anatomy import backbone
from shearing.pruning.structured.importance.metric import Evidence
from shearing.pruning.structured.importance.registry import metric_of
from shearing.pruning.structured.importance.text_loss import finite, labels_of, number_of_labels, sum_of_losses
from tests.models.tiny import tiny_ids, tiny_model


def test_every_token_but_the_first_of_a_row_is_a_label() -> None:
    model, ids = tiny_model(), tiny_ids(sequences=3, length=12)
    batch = Inputs(ids)
    hidden = backbone(model)(**batch.keywords()).last_hidden_state
    logits = model(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(sum_of_losses(model, hidden, batch), expected)
    assert number_of_labels([batch, batch]) == 2 * 3 * 11


def test_first_tokens_of_documents_count_only_where_the_rules_say_so() -> None:
    ids = tiny_ids(sequences=1, length=6)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1]])
    documents = DocumentRules(loss_across=False).documents(positions, device=torch.device("cpu"))
    labels = labels_of(Inputs(ids, documents))
    expected = ids[:, 1:].clone()
    expected[0, [2, 4]] = -100
    assert torch.equal(labels, expected)
    assert number_of_labels([Inputs(ids, documents)]) == 3


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_an_error_of_the_metric(loss: float) -> None:
    assert finite(1.5, metric="leave_one_out") == 1.5
    with pytest.raises(ShearingError) as refused:
        finite(loss, metric="leave_one_out")
    assert refused.value.field == "initial_masks (leave_one_out)"


WITHOUT_LABELS = [
    "layer_taylor",
    "leave_one_out",
    "leave_one_out_sublayers",
    "leave_one_out_greedy",
    "shapley",
    "shapley_logits",
    "policy_gradient",
    "hard_budget",
]


@pytest.mark.parametrize("name", WITHOUT_LABELS)
def test_text_without_labels_is_refused_before_any_work(name: str) -> None:
    positions = torch.zeros(2, 4, dtype=torch.int64)  # documents of one token each
    documents = DocumentRules(loss_across=False).documents(positions, device=torch.device("cpu"))
    calls: list[int] = []
    with pytest.raises(ShearingError) as refused:
        metric_of(name).scores(
            tiny_model(),
            evidence=Evidence(text=[Inputs(tiny_ids(length=3), documents)]),
            advance=calls.append,
        )
    assert refused.value.field == "calibration_tokens"
    assert not calls
