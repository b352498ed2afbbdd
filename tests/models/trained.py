"""A tiny model that has learned something: to count, from any number on, in steps that it sees at the beginning."""

from __future__ import annotations

import copy
import functools

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from tests.models.tiny import SIZES, VOCAB_SIZE


def counting(*, sequences: int, length: int = 16, seed: int) -> torch.Tensor:
    """Token ids [sequences, length]: from anywhere on in steps of 1 to 4, modulo the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCAB_SIZE, (sequences, 1), generator=generator)
    step = torch.randint(1, 5, (sequences, 1), generator=generator)
    return (first + step * torch.arange(length)) % VOCAB_SIZE


def trained_model(*, layers: int = 6) -> PreTrainedModel:
    """A model of its own that counts, fp32, in evaluation mode; trained once for all tests, in seconds."""
    return copy.deepcopy(_trained(layers))


@functools.cache
def _trained(layers: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "num_hidden_layers": layers}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(100):
        ids = counting(sequences=24, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
