"""Held-out losses against losses computed directly from the model's own logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.data.corpus.bos import Bos
from shearing.data.documents import DocumentRules
from shearing.errors import ShearingError
from shearing.evaluation.heldout import DomainLoss, heldout_loss, macro_mean
from shearing.models.masked import MaskedModel, Masks
from shearing.models.stored.paging.on_demand import on_demand
from shearing.models.stored.stored_model import open_source
from shearing.processes.processes import Processes
from tests.evaluation.test_text_bytes import byte_level

VOCAB = 320
LENGTH = 8


@dataclass
class Rows:
    """Held-out rows in memory, with the interface of a corpus."""

    rows: dict[str, Tensor]
    bos = Bos()

    @property
    def domains(self) -> list[str]:
        return list(self.rows)

    positions: dict[str, Tensor] | None = None
    counted: dict[str, Tensor] | None = None
    path: str = "in memory"

    def heldout_counted(
        self, domain: str, *, split: str, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor | None]:
        assert split == "test"
        counted = (self.counted or {}).get(domain, torch.ones(len(self.rows[domain]), sequence_length + 1).bool())
        for part in counted[: tokens // sequence_length].split(micro_batch_size):
            yield None if self.counted is None else part

    def heldout_positions(
        self, domain: str, *, split: str, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        assert split == "test"
        assert self.positions is not None
        yield from self.positions[domain][: tokens // sequence_length].split(micro_batch_size)

    def heldout_batches(
        self, domain: str, *, split: str, sequence_length: int, tokens: int, micro_batch_size: int
    ) -> Iterator[Tensor]:
        assert split == "test"
        yield from self.rows[domain][: tokens // sequence_length].split(micro_batch_size)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def corpus() -> Any:
    generator = torch.Generator().manual_seed(1)
    return Rows({name: torch.randint(300, (7, LENGTH + 1), generator=generator) for name in ("one", "two")})


def measure(model: Any, corpus: Any, **changes: Any) -> dict[str, DomainLoss]:
    settings = {
        "split": "test",
        "tokens_per_domain": 5 * LENGTH,
        "sequence_length": LENGTH,
        "micro_batch_size": 2,
        "precision": None,
        "chunk_tokens": 3,
    }
    return heldout_loss(model, corpus, **{**settings, **changes})


@torch.no_grad()
def direct(model: LlamaForCausalLM, rows: Tensor) -> float:
    logits = model.eval()(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()


def test_loss_and_perplexity_are_those_of_the_logits(model: LlamaForCausalLM, corpus: Any) -> None:
    losses = measure(model, corpus)

    assert list(losses) == ["one", "two"]
    for domain, loss in losses.items():
        expected = direct(model, corpus.rows[domain][:5])
        assert loss.loss == pytest.approx(expected, rel=1e-5)
        assert loss.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
        assert loss.tokens == 5 * LENGTH
        assert loss.bits_per_byte is None


def test_weights_that_come_on_demand_give_the_same_losses_to_the_bit(
    model: LlamaForCausalLM, corpus: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    device = torch.device("cpu")
    visiting = on_demand(open_source(str(tmp_path), revision=None, converted=tmp_path), device=device)
    for precision in (None, torch.bfloat16):
        assert measure(visiting, corpus, precision=precision) == measure(model, corpus, precision=precision)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_and_the_mode_comes_back(model: LlamaForCausalLM, corpus: Any, training: bool) -> None:
    model.train(training)
    first = measure(model, corpus)

    assert model.training is training
    assert measure(model, corpus) == first


def test_the_mode_comes_back_after_an_error(model: LlamaForCausalLM, corpus: Any) -> None:
    model.train()
    corpus.rows["two"] = torch.full((7, LENGTH + 1), VOCAB + 1)

    with pytest.raises(IndexError):
        measure(model, corpus)
    assert model.training


def test_micro_batches_and_chunks_do_not_change_the_result(model: LlamaForCausalLM, corpus: Any) -> None:
    whole = measure(model, corpus, micro_batch_size=7, chunk_tokens=10_000)
    pieces = measure(model, corpus, micro_batch_size=1, chunk_tokens=1)

    for domain in whole:
        assert pieces[domain].loss == pytest.approx(whole[domain].loss, rel=1e-6)


def test_a_masked_model_is_measured_under_its_masks(model: LlamaForCausalLM, corpus: Any) -> None:
    plain = measure(model, corpus)
    masked = MaskedModel(model)

    masked.set_masks(Masks(mlp=torch.tensor([1.0, 0.0])))
    without_mlp = measure(masked, corpus)
    masked.set_masks(None)

    assert measure(masked, corpus)["one"].loss == pytest.approx(plain["one"].loss, rel=1e-6)
    masked.release()
    torch.nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    assert without_mlp["one"].loss == pytest.approx(direct(model, corpus.rows["one"][:5]), rel=1e-5)


def test_bits_per_byte_of_multi_byte_text(model: LlamaForCausalLM) -> None:
    tokenizer = byte_level()
    end = tokenizer.eos_token_id
    text = "日本語 naïve 👩‍🚀→→ plain"
    tokens = [end, *tokenizer.encode(text), end]
    corpus: Any = Rows({"text": torch.tensor([tokens])})

    loss = measure(model, corpus, sequence_length=len(tokens) - 1, tokens_per_domain=999, tokenizer=tokenizer)["text"]

    nats = direct(model, torch.tensor([tokens])) * (len(tokens) - 1)
    assert loss.bits_per_byte == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("across", [True, False])
def test_documents_count_as_in_training(model: LlamaForCausalLM, corpus: Any, across: bool) -> None:
    rules = DocumentRules(attention_within=True, loss_across=across)
    corpus.positions = {name: torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0]).repeat(7, 1) for name in corpus.domains}
    end = byte_level().eos_token_id
    for rows in corpus.rows.values():
        rows[:, [2, 7]] = end
    found = measure(model, corpus, rules=rules, tokenizer=byte_level())
    assert model.config._attn_implementation == "sdpa"
    for name, loss in found.items():
        nats = 0.0
        for row in corpus.rows[name][:5].tolist():
            for document in (row[:3], row[3:8]):
                nats += direct(model, torch.tensor([document])) * (len(document) - 1)
            # Across: the separator predicts the first token of the next document, from what it has seen itself.
            for document, label in ((row[:3], row[3]), (row[3:8], row[8])) if across else ():
                nats -= model(torch.tensor([document])).logits[0, -1].log_softmax(-1)[label].item()
        assert loss.tokens == 5 * (8 if across else 6)
        assert loss.loss == pytest.approx(nats / loss.tokens, rel=1e-5)
        assert loss.bits_per_byte is not None


def test_progress_counts_every_token(model: LlamaForCausalLM, corpus: Any) -> None:
    seen: list[int] = []
    losses = measure(model, corpus, progress=seen.append)

    assert sum(seen) == sum(loss.tokens for loss in losses.values())
    assert len(seen) == 6


@pytest.mark.parametrize(("size", "micro_batch_size", "passes"), [(2, 1, 3), (3, 1, 2), (2, 4, 1), (3, 4, 1)])
def test_processes_with_shared_weights_read_equally_often_and_count_each_row_once(
    size: int, micro_batch_size: int, passes: int, model: LlamaForCausalLM, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of them alone, in turn: what it would add to the sum over processes.
    monkeypatch.setattr(Processes, "sum", lambda _, values: values)
    whole = measure(model, corpus, micro_batch_size=1, tokenizer=byte_level())
    parts, calls, told = [], [], []
    for rank in range(size):
        read: list[Tensor] = []
        seen: list[tuple[int, int]] = []

        def objective(tokens: Tensor, _: Any, read: list[Tensor] = read) -> Tensor:
            read.append(tokens)
            logits = model(input_ids=tokens[:, :-1]).logits
            return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

        def progress(tokens: int, read: list[Tensor] = read, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((tokens, len(read)))

        changes = {"processes": Processes(rank=rank, size=size), "objective": objective, "progress": progress}
        parts.append(measure(model, corpus, micro_batch_size=micro_batch_size, tokenizer=byte_level(), **changes))
        calls.append(len(read))
        assert max(map(len, read)) <= -(-5 // size)  # no process has more than its share
        told.append(seen)
    assert calls == [2 * passes] * size
    assert all(each == told[0] for each in told)
    for domain, loss in whole.items():
        assert {part[domain].tokens for part in parts} == {loss.tokens}
        assert sum(part[domain].loss for part in parts) == pytest.approx(loss.loss, rel=1e-6)
        assert sum(_bytes(part[domain]) for part in parts) == pytest.approx(_bytes(loss), rel=1e-6)


def _bytes(loss: DomainLoss) -> float:
    """Of the text that was counted."""
    assert loss.bits_per_byte is not None
    return loss.loss * loss.tokens / math.log(2) / loss.bits_per_byte


def test_autocast_changes_the_loss_only_slightly(model: LlamaForCausalLM, corpus: Any) -> None:
    exact, rough = measure(model, corpus), measure(model, corpus, precision=torch.bfloat16)

    assert rough["one"].loss != exact["one"].loss
    assert rough["one"].loss == pytest.approx(exact["one"].loss, rel=1e-2)
    assert measure(model, corpus, precision=torch.float32) == exact


def test_a_model_that_diverged_has_a_loss_that_says_so(model: LlamaForCausalLM, corpus: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    assert math.isnan(measure(model, corpus)["one"].loss)


def test_macro_mean_counts_each_domain_once() -> None:
    mean = macro_mean({"a": DomainLoss(1.0, math.e, 0.5, 10), "b": DomainLoss(3.0, math.exp(3), 1.5, 1000)})

    assert mean == DomainLoss(2.0, math.exp(2.0), 1.0, 1010)
    assert macro_mean({"a": DomainLoss(1000.0, math.inf, None, 1)}) == DomainLoss(1000.0, math.inf, None, 1)


@pytest.mark.parametrize("across", [True, False])
def test_labels_that_do_not_count(model: LlamaForCausalLM, corpus: Any, across: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    corpus.counted = {"one": torch.rand(7, LENGTH + 1, generator=generator) < 0.4}
    corpus.positions = {name: torch.arange(LENGTH + 1).remainder(3).expand(7, -1).clone() for name in corpus.rows}
    losses = measure(model, corpus, rules=DocumentRules(loss_across=across))
    for domain, loss in losses.items():
        rows = corpus.rows[domain][:5]
        labels = rows[:, 1:].clone()
        if domain == "one":
            labels[~corpus.counted[domain][:5, 1:]] = -100
        if not across:
            labels[corpus.positions[domain][:5, 1:] == 0] = -100
        with torch.no_grad():
            logits = model.eval()(input_ids=rows[:, :-1]).logits
        assert loss.loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item(), rel=1e-5)
        assert loss.tokens == int((labels != -100).sum())


def test_text_of_which_nothing_counts(model: LlamaForCausalLM, corpus: Any) -> None:
    corpus.counted = {"two": torch.zeros(7, LENGTH + 1).bool()}
    with pytest.raises(ShearingError, match="the test text of two"):
        measure(model, corpus)
    losses = measure(model, corpus, require_labels=False)
    assert losses["two"].to_json() == {"loss": None, "perplexity": None, "bits_per_byte": None, "tokens": 0}
    corpus.counted = {}
    assert losses["one"] == measure(model, corpus)["one"]
