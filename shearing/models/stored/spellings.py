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

_FLOATS = frozenset({"factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"})
"""Parameters that version 4 warns of where JSON has them without a decimal point."""


def in_both_spellings(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the names of transformers 4 added where it has only those of 5; names that are there stay.

    `rope_parameters` also as `rope_theta` and `rope_scaling` (null for plain RoPE), `dtype` also as `torch_dtype`.
    RoPE that differs between layers has no names in version 4 that all families share, and is left as it is.

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
    return both


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
