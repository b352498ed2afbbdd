"""Families declared outside the project, one for each thing that the shipped ones do not have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import Starcoder2Config

from shearing.models.families import (
    FAMILIES,
    HIDDEN,
    INTERMEDIATE,
    LAYER,
    Family,
    Norm,
    SubLayer,
    flag,
    linear,
    separate_attention,
)
from tests.models.tiny import CONFIGS, SIZES

STARCODER2 = Family(  # layer norms with biases, and an MLP without a gate
    model_type="starcoder2",
    attention=separate_attention(
        before=Norm("input_layernorm", kind=LAYER, bias=True), qkv_bias=flag("use_bias"), output_bias=flag("use_bias")
    ),
    mlp=SubLayer(
        module="mlp",
        linears=(
            *linear("mlp.c_fc", INTERMEDIATE, HIDDEN, bias=flag("use_bias")),
            *linear("mlp.c_proj", HIDDEN, INTERMEDIATE, bias=flag("use_bias")),
        ),
        write="mlp.c_proj",
        before=Norm("post_attention_layernorm", kind=LAYER, bias=True),
    ),
    final_norm=Norm("model.norm", kind=LAYER, bias=True),
)

DECLARED = {family.model_type: family for family in (STARCODER2,)}
DECLARED_CONFIGS: dict[str, Callable[..., Any]] = {
    "starcoder2": lambda **kw: Starcoder2Config(**{**SIZES, **kw}),
}


@contextmanager
def declared_families() -> Iterator[None]:
    """Has the project know these families, and `tiny_model` their configs, while the context lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for model_type, family in DECLARED.items():
            patch.setitem(FAMILIES, model_type, family)
        for name, config in DECLARED_CONFIGS.items():
            patch.setitem(CONFIGS, name, config)
        yield
