"""Models that really lack layers, and what they are worth."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from transformers import PreTrainedModel

from shearing.data.documents import Inputs


def shortened(model: PreTrainedModel, *, without: Collection[int]) -> PreTrainedModel:
    """A copy of a Llama whose list of layers lacks some."""
    short = copy.deepcopy(model)
    stays = [layer for index, layer in enumerate(short.model.layers) if index not in without]
    short.model.layers = torch.nn.ModuleList(stays)
    short.config.num_hidden_layers = len(stays)
    return short


@torch.no_grad()
def loss_of(model: PreTrainedModel, text: Collection[Inputs]) -> float:
    """Mean loss over batches of one size."""
    losses = [float(model(input_ids=batch.tokens, labels=batch.tokens, use_cache=False).loss) for batch in text]
    return sum(losses) / len(losses)
