"""Greedy agreement and KL between two models, against whole logits and the divergences of torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import AutoConfig, LlamaForCausalLM, PreTrainedModel

from shearing.data.documents import DocumentRules
from shearing.evaluation.agreement import Read, agreement
from shearing.models.loading import load_source


@pytest.fixture(scope="module")
def pair(tiny_inputs: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    source = load_source(str(tiny_inputs / "model"))
    other = load_source(str(tiny_inputs / "model"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.02)
    return other, source


def tokens_of(seed: int, *, rows: int) -> torch.Tensor:
    return torch.randint(2, 20, (rows, 13), generator=torch.Generator().manual_seed(seed))


def test_agreement_is_that_of_whole_distributions(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, source = pair
    rows = [(tokens_of(0, rows=3), None), (tokens_of(1, rows=2), None)]
    found = agreement(Read(model, rows), Read(source, rows), chunk_tokens=7)
    divergences, same = [], []
    for batch, _ in rows:
        with torch.no_grad():
            ours, theirs = (each(batch[:, :-1]).logits.double() for each in (model, source))
        divergences.append(kl_divergence(Categorical(logits=theirs), Categorical(logits=ours)).flatten())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).flatten())
    assert found.tokens == 5 * 12
    assert found.kl == pytest.approx(float(torch.cat(divergences).mean()), rel=1e-4)
    assert found.kl > 0
    assert found.greedy == float(torch.cat(same).double().mean())
    assert 0 < found.greedy < 1


def test_a_model_agrees_with_itself(pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    rows = [(tokens_of(0, rows=3), None)]
    found = agreement(Read(pair[0], rows), Read(pair[0], rows))
    assert found.greedy == 1
    assert found.kl == pytest.approx(0, abs=1e-7)


def test_labels_that_begin_documents_do_not_count_and_attention_stays_inside(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, source = pair
    batch, cut = tokens_of(2, rows=1), 5
    positions = torch.tensor([[*range(cut), *range(13 - cut)]])
    rules = DocumentRules(attention_within=True, loss_across=False)
    rows = [(batch, rules.documents(positions, device=torch.device("cpu")))]
    whole = agreement(*(Read(each, rows, within_documents=True) for each in (model, source)))
    parts = [[(batch[:, :cut], None)], [(batch[:, cut:], None)]]
    apart = [agreement(*(Read(each, part) for each in (model, source))) for part in parts]
    assert whole.tokens == 11
    assert whole.kl == pytest.approx(sum(each.kl * each.tokens for each in apart) / 11, rel=1e-4)
    assert whole.greedy == pytest.approx(sum(each.greedy * each.tokens for each in apart) / 11)


def test_other_vocabularies_are_refused(pair: tuple[PreTrainedModel, PreTrainedModel], tiny_inputs: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_inputs / "model")
    config.vocab_size = 30
    rows = [(tokens_of(0, rows=1), None)]
    with pytest.raises(ValueError, match="30 and 20"):
        agreement(Read(LlamaForCausalLM(config), rows), Read(pair[0], rows))
