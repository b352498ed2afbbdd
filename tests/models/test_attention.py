"""Attention without mask tensors computes what Hugging Face's computes."""

from __future__ import annotations

import json

import pytest
import torch

from shearing.models.attention import drop_attention_mask
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [4, 16], ids=["within the window", "past the window"])
def test_logits_are_unchanged(family, length):
    model = tiny_model(family)
    ids = tiny_ids(length=length)
    expected = model(ids).logits
    drop_attention_mask(model, sequence_length=length)
    slides = family in ("mistral", "qwen2-sliding") and length > 4
    assert model.config._attn_implementation == ("sdpa" if slides else "causal_sdpa")
    torch.testing.assert_close(model(ids).logits, expected)


def test_the_change_is_not_saved(tmp_path):
    model = tiny_model()
    drop_attention_mask(model, sequence_length=16)
    model.save_pretrained(tmp_path)
    assert "causal_sdpa" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
