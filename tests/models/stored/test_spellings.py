"""What transformers 4.57 makes of a config that was written here, worked out by hand, and that 5 reads the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from shearing.models.stored.saving import write_model
from shearing.models.stored.spellings import in_both_spellings
from tests.models.tiny import tiny_ids, tiny_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}

RoPE = dict[str, Any]
# What a source says, in the names of version 4, and what its reader makes of the result: `config.rope_theta` and
# `config.rope_scaling`, whose default is 10,000 and None. Its RoPE reads nothing else but sizes.
CASES: dict[str, tuple[RoPE, float, RoPE | None]] = {
    "theta": ({"rope_theta": 500_000.0}, 500_000.0, None),
    "default": ({}, 10_000.0, None),
    "llama3": ({"rope_theta": 500_000.0, "rope_scaling": LLAMA3}, 500_000.0, LLAMA3),
    "yarn": ({"rope_theta": 1_000_000.0, "rope_scaling": YARN}, 1_000_000.0, YARN),
    "linear, in the oldest spelling": (
        {"rope_theta": 10_000.0, "rope_scaling": {"type": "linear", "factor": 2}},
        10_000.0,
        {"type": "linear", "rope_type": "linear", "factor": 2.0},
    ),
    "dynamic": (
        {"rope_theta": 20_000.0, "rope_scaling": {"rope_type": "dynamic", "factor": 3.0}},
        20_000.0,
        {"rope_type": "dynamic", "factor": 3.0},
    ),
}


def config(**rope: Any) -> LlamaConfig:
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=256, **rope)


def read_by_version_4(content: dict[str, Any]) -> tuple[float, RoPE | None]:
    """`LlamaConfig.__init__` of transformers 4.57: two arguments with their defaults, and `type` is `rope_type`."""
    scaling = content.get("rope_scaling")
    if scaling is not None and "type" in scaling:
        scaling = {**scaling, "rope_type": scaling["type"]}
    return content.get("rope_theta", 10_000.0), scaling


@pytest.mark.parametrize("name", CASES)
def test_both_versions_read_the_rope_of_the_source(name: str, tmp_path: Path) -> None:
    said, theta, scaling = CASES[name]
    source = config(**json.loads(json.dumps(said)))
    write_model(AutoModelForCausalLM.from_config(source), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert read_by_version_4(content) == (theta, scaling)
    # Its validation warns of names that a kind of RoPE has not, and of numbers that are not floats.
    if scaling is not None:
        assert isinstance(content["rope_scaling"]["factor"], float)
        assert "rope_theta" not in content["rope_scaling"]
    assert content["torch_dtype"] == content["dtype"] == "float32"
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == source.rope_parameters
    kept, found = (
        each.model.rotary_emb
        for each in (AutoModelForCausalLM.from_config(source), AutoModelForCausalLM.from_pretrained(tmp_path))
    )
    assert torch.equal(found.inv_freq, kept.inv_freq)
    assert found.attention_scaling == kept.attention_scaling


def test_a_window_that_is_off_is_said(tmp_path: Path) -> None:
    """Version 4 takes 4,096 for Mistral where nothing is said."""
    sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    source = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, sliding_window=None)
    write_model(AutoModelForCausalLM.from_config(source), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["sliding_window"] is None
    assert content["tie_word_embeddings"] is False  # version 4 ties unless it is told not to


def test_what_is_said_already_stays() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert in_both_spellings(old) == old
    both = in_both_spellings({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "dtype": "bfloat16"})
    assert both == {
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "rope_theta": 5e5,
        "rope_scaling": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }
    assert in_both_spellings(both) == both


def test_a_share_of_the_head_that_is_turned_is_beside_the_scaling() -> None:
    rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    both = in_both_spellings({"rope_parameters": rope})
    assert both["partial_rotary_factor"] == 0.5
    assert both["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("kind", "thetas", "added"),
    [
        ("gemma3_text", (1e6, 1e4), {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("olmo3", (5e5, 5e5), {"rope_theta": 5e5}),
        ("olmo3", (5e5, 1e4), None),
    ],
)
def test_rope_of_layers_with_windows_has_the_names_of_its_family(
    kind: str, thetas: tuple[float, float], added: RoPE | None
) -> None:
    """`Gemma3TextConfig` and `Olmo3Config` of 4.57: the scaling is for layers without windows."""
    whole, window = ({"rope_theta": theta, "rope_type": "default"} for theta in thetas)
    whole |= {"rope_type": "linear", "factor": 8}
    content = {"model_type": kind, "rope_parameters": {"full_attention": whole, "sliding_attention": window}}
    both = in_both_spellings(content)
    if added is None:
        assert both == content
        return
    assert both == {**content, **added, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert AutoConfig.for_model(**both).rope_parameters == AutoConfig.for_model(**content).rope_parameters


def test_rope_that_differs_between_layers_is_left() -> None:
    nested = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert in_both_spellings(nested) == nested


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "phi3-longrope"])
def test_families_with_names_of_their_own(family: str, tmp_path: Path) -> None:
    """In 4.57 GPTNeoXConfig has others, and Phi3Config refuses a fourth one in `rope_scaling`."""
    source = tiny_model(family)
    write_model(source, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    if family == "gpt_neox":
        assert (content["rotary_emb_base"], content["rotary_pct"], content["rope_scaling"]) == (10_000.0, 0.5, None)
    else:
        assert content["partial_rotary_factor"] == source.config.rope_parameters["partial_rotary_factor"]
        kinds = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 4.0]}
        assert content["rope_scaling"] == (kinds if family == "phi3-longrope" else None)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    said, read = source.config.rope_parameters, found.config.rope_parameters
    assert {name: read[name] for name in said} == said
    for length in (4, 16):  # before and behind the length from which longrope has other factors
        ids = tiny_ids(length=length)
        assert torch.equal(found(ids).logits, source(ids).logits)
