"""Held-out losses of texts that begin with a token: of the text alone, whose bytes are exactly those of the text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shearing.data.corpus.bos import Bos
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.format import tokenizer_fingerprint
from shearing.data.corpus.writer import CorpusWriter
from shearing.evaluation.heldout import heldout_loss
from tests.evaluation.test_text_bytes import byte_fallback

TOKENIZER = byte_fallback()
BEGIN, END = 1, 2
LENGTH = 12
TEXTS = [f"plain {'né ' * (i % 5)}pain {i}" for i in range(60)]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def write(path: Path, mode: str) -> Corpus:
    writer = CorpusWriter(
        path,
        vocab_size=len(TOKENIZER),
        separator_id=END,
        tokenizer="fallback",
        tokenizer_fingerprint=tokenizer_fingerprint(TOKENIZER),
        validation_fraction=0.1,
        test_fraction=0.4,
        bos=Bos(mode, None if mode == "none" else BEGIN),  # type: ignore[arg-type]
    )
    with writer.domain("a", sources=["made up"], inputs="a") as domain:
        for text in TEXTS:
            domain.add(text, token_ids=TOKENIZER.encode(text, add_special_tokens=False))
    return writer.finish()


def measured(model: LlamaForCausalLM, corpus: Corpus) -> Any:
    settings: dict[str, Any] = {"split": "test", "tokens_per_domain": 10_000, "sequence_length": LENGTH}
    return heldout_loss(model, corpus, micro_batch_size=3, tokenizer=TOKENIZER, **settings)["a"]


@torch.no_grad()
def losses_of(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Loss of every label [B, S]."""
    logits = model(input_ids=rows[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")


@pytest.mark.parametrize("mode", ["none", "document", "row"])
def test_losses_and_bytes_are_those_of_the_text(mode: str, model: LlamaForCausalLM, tmp_path: Path) -> None:
    corpus = write(tmp_path, mode)
    tokens = corpus.tokens("a", split="test")
    stream = torch.from_numpy(tokens.read(0, len(tokens)).astype("int64"))
    if mode == "row":
        count = len(stream) // LENGTH
        cut = stream[: count * LENGTH].view(count, LENGTH)
        rows = torch.cat([torch.full((count, 1), BEGIN), cut], dim=1)
    else:
        count = (len(stream) - 1) // LENGTH
        rows = stream[: count * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)
    losses, labels = losses_of(model, rows), rows[:, 1:]
    counts = labels != BEGIN
    found = measured(model, corpus)
    assert found.tokens == int(counts.sum())
    assert found.loss == pytest.approx(losses[counts].mean().item(), rel=1e-5)

    # Bytes: what the labels add to the text, the last document cut off where the last row ends.
    read = rows[:, 1:].flatten() if mode == "row" else stream[1 : count * LENGTH + 1]
    first = [] if mode == "row" else stream[:1].tolist()
    pieces: list[list[int]] = [[]]
    for token in [*first, *read.tolist()]:
        if token == END:
            pieces.append([])
        elif token != BEGIN:
            pieces[-1].append(token)
    total = sum(len(TOKENIZER.decode(piece).encode()) for piece in pieces)
    known = total - (len(TOKENIZER.decode(first).encode()) if mode == "none" else 0)
    assert found.bits_per_byte == pytest.approx(losses[counts].sum().item() / math.log(2) / known, rel=1e-4)
