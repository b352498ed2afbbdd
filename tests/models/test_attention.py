"""Attention without mask tensors computes what Hugging Face's computes."""

from __future__ import annotations

import json

import pytest
import torch
import transformers.modeling_flash_attention_utils as flash_utils
from torch.nn import functional as F

from shearing.errors import ShearingError
from shearing.models.anatomy import anatomy_of
from shearing.models.attention import drop_attention_mask
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [4, 16], ids=["within the window", "past the window"])
def test_logits_are_unchanged(family, length):
    model = tiny_model(family)
    ids = tiny_ids(length=length)
    expected = model(ids).logits
    drop_attention_mask(model, sequence_length=length)
    slides = length > 4 and (family == "mistral" or "sliding_attention" in getattr(model.config, "layer_types", ()))
    plain = "sdpa" if slides else "causal_sdpa"
    assert model.config._attn_implementation == ("eager" if anatomy_of(model.config).attention_cap else plain)
    torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("family", ["llama", "qwen2-sliding", "gemma2"])
def test_flash_attention_is_found_and_not_told_of_positions(family, monkeypatch):
    def flash(q, k, v, *, causal, softmax_scale, dropout_p=0.0, window_size=(-1, -1), softcap=None):
        assert causal
        distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (distance >= 0) & (distance <= (window_size[0] if window_size[0] >= 0 else q.shape[1]))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if softcap is not None:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
            scores = softcap * torch.tanh(q @ k.mT * softmax_scale / softcap)
            return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True).transpose(1, 2)

    def imported(implementation):
        assert implementation == "flash_attention_2"
        return (flash, None, None, None, None), (flash_utils._lazy_define_process_function(flash), None)

    monkeypatch.setattr(flash_utils, "lazy_import_flash_attention", imported)
    model, ids = tiny_model(family), tiny_ids(sequences=1, length=16)
    expected = model(ids).logits
    model.config._attn_implementation = "flash_attention_2"
    drop_attention_mask(model, sequence_length=16)
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)


def test_several_tokens_behind_a_cache_are_refused_and_single_ones_see_it():
    model, ids = tiny_model(), tiny_ids(length=16)
    expected = model(ids).logits
    drop_attention_mask(model, sequence_length=16)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ShearingError, match="16 keys for 8 tokens"):
        model(ids[:, 8:], past_key_values=cache)
    cache = model(ids[:, :15], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 15:], past_key_values=cache).logits, expected[:, 15:])


def test_the_change_is_not_saved(tmp_path):
    model = tiny_model()
    drop_attention_mask(model, sequence_length=16)
    model.save_pretrained(tmp_path)
    assert "causal_sdpa" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
