"""`config.json` as every reader takes it: what transformers 4 and 5 call differently is there under both names.

A reader of transformers 4 that finds only the names of 5 takes its own defaults and says nothing: RoPE with a base of
10,000 and no scaling. Version 5 reads both, and they say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BESIDE_SCALING = ("rope_theta", "partial_rotary_factor")
"""What version 4 has at the top of the config, and 5 among `rope_parameters`."""

_OF_FAMILY = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}
"""What version 4 calls them in a family that has its own names."""

_LOCAL_THETA = {"gemma3_text": "rope_local_base_freq", "olmo3": None}
"""Family with windows whose layers have no scaling in version 4 -> what the theta of those with windows is called."""

_FLOATS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"})
"""Parameters that version 4 warns of where JSON has them without a decimal point."""


def in_both_spellings(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the names of transformers 4 added where it has only those of 5; names that are there stay.

    `rope_parameters` also as `rope_theta` and `rope_scaling` (null for plain RoPE), `dtype` also as `torch_dtype`.
    RoPE that differs between layers with windows and without has names of version 4 where its family could say it: the
    scaling is that without windows, and both have one theta unless `_LOCAL_THETA` names another. Else it is left.

    Args:
        content: of config.json.
    """
    both = dict(content)
    if "dtype" in content:
        both.setdefault("torch_dtype", content["dtype"])
    rope = content.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope and not {"rope_theta", "rope_scaling"} & content.keys():
        names = _OF_FAMILY.get(str(content.get("model_type")), {})
        both |= {names.get(name, name): rope[name] for name in _BESIDE_SCALING if name in rope}
        both["rope_scaling"] = _scaling(rope, model_type=content.get("model_type"))
    elif isinstance(rope, Mapping) and not {"rope_theta", "rope_scaling"} & content.keys():
        both |= _by_window(rope, model_type=str(content.get("model_type")))
    return both


def _by_window(rope: Mapping[str, Any], *, model_type: str) -> dict[str, Any]:
    whole, window = rope.get("full_attention"), rope.get("sliding_attention")
    if model_type not in _LOCAL_THETA or not isinstance(whole, Mapping) or not isinstance(window, Mapping):
        return {}
    local = _LOCAL_THETA[model_type]
    if _scaling(window) is not None or (local is None and window["rope_theta"] != whole["rope_theta"]):
        return {}
    said = {"rope_theta": whole["rope_theta"], "rope_scaling": _scaling(whole)}
    return said if local is None else {**said, local: window["rope_theta"]}


def _scaling(rope: Mapping[str, Any], *, model_type: object = None) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if model_type == "phi3":  # whose config of version 4 refuses any more names
        return {"type": kind, "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    return {
        name: float(value) if name in _FLOATS and value is not None else value
        for name, value in rope.items()
        if name not in _BESIDE_SCALING
    }
