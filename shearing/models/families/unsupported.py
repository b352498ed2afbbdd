"""What is said of a model that is of no supported family: what is supported, and what of it could be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shearing.errors import ShearingError
from shearing.models.families import FAMILIES

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_STATES = ("mamba", "ssm", "linear_attn", "linear_conv", "hybrid_override", "layers_block_type", "rwkv")
"""How names of settings begin that only models with states of their own have, in place of attention."""


def unsupported(values: Mapping[str, Any]) -> ShearingError:
    """The error about a config that is of no supported family, or of one in a form that is not supported.

    Args:
        values: of config.json.
    """
    kind = values.get("model_type")
    value: Any = kind
    mend = "choose a source model of a supported family, or declare the family under shearing/models/families"
    text = values.get("text_config")
    if kind in FAMILIES:
        value = f"{kind} that attends in both directions"
        mend = "take the model that predicts the next token, without use_bidirectional_attention"
    elif isinstance(text, Mapping):
        inner = text.get("model_type")
        value = f"{kind}, which reads more than text"
        if inner in FAMILIES:
            mend = f"its text model alone can be the source: save it as the {inner} that it is (docs/families.md)"
        else:
            mend = f"choose another source model: its text model, {inner}, is of no supported family either"
    elif _is_hybrid(values):
        value = f"{kind}, whose layers are not all attention and MLP"
        mend = "choose a source model whose layers are: what has states of its own has no units that could be cut here"
    elif "auto_map" in values:
        value = f"{kind}, with code of its own beside config.json"
        mend = (
            "code that comes with a model is not run: if it is one of these under another name, set model_type in "
            "config.json; else declare the family under shearing/models/families"
        )
    return ShearingError("source (architecture)", value=value, allowed=", ".join(sorted(FAMILIES)), mend=mend)


def _is_hybrid(values: Mapping[str, Any]) -> bool:
    layers = values.get("layer_types") or []
    return bool(set(layers) - _ATTENTION) or any(name.startswith(_STATES) for name in values)
