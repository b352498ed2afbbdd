"""From masks to an ordinary model, through the stages as a user runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.runs.context import RunContext
from shearing.runs.recipe import load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.compact import compact
from shearing.runs.stages.run import run

BUDGET = [
    "prune.estimator=hard_concrete",
    "target.num_hidden_layers=null",
    "target.hidden_size=null",
    "target.intermediate_size=null",
    "target.num_attention_heads=null",
    "target.num_key_value_heads=null",
    "target.parameters=12000",
]


def shear(recipe_path: Path, *overrides: str, stages: tuple[str, ...] = ("prune", "compact")) -> RunDirectory:
    return run(load_recipe(recipe_path, overrides=overrides), stages=stages)


def test_everything_that_belongs_to_the_model_is_carried_over(tiny_recipe, tiny_inputs, tmp_path):
    source = shutil.copytree(tiny_inputs / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    directory = shear(tiny_recipe, f"model.source={source}")
    model = AutoModelForCausalLM.from_pretrained(directory.compact)
    small = AutoTokenizer.from_pretrained(directory.compact)
    assert Shape.of(model.config).sizes() == {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    assert small.chat_template == tokenizer.chat_template
    assert small("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert model.generation_config.temperature == 0.3
    assert model.generate(torch.tensor([[2, 3]]), max_new_tokens=3, min_new_tokens=3).shape == (1, 5)
    shape = json.loads((directory.compact / "shape.json").read_text())
    assert shape["relative_logit_difference"] < 1e-5
    assert shape["target"]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_budget_ends_in_a_uniform_model_within_it(tiny_recipe):
    directory = shear(tiny_recipe, *BUDGET, "target.uniform=true")
    model = AutoModelForCausalLM.from_pretrained(directory.compact)
    assert 9_000 < sum(p.numel() for p in model.parameters()) <= 12_000


def test_a_budget_alone_is_masks_and_says_so(tiny_recipe):
    directory = shear(tiny_recipe, *BUDGET, stages=("prune",))
    masks = load_file(directory.prune / "masks.safetensors")
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for mask in masks.values())
    with pytest.raises(ShearingError, match=r"target\.uniform"):
        compact(RunContext(load_recipe(tiny_recipe, overrides=BUDGET)))
    assert not directory.compact.exists()


def test_sublayers_are_pruned_apart_and_end_in_ordinary_layers(tiny_recipe):
    directory = shear(
        tiny_recipe, "prune.granularities=[sublayers, kv_groups, query_heads, intermediate, hidden]", "prune.duration=8"
    )
    masks = load_file(directory.prune / "masks.safetensors")
    assert masks["attention"].sum() == masks["mlp"].sum() == 2
    assert AutoModelForCausalLM.from_pretrained(directory.compact).config.num_hidden_layers == 2


def test_an_interrupted_cut_leaves_nothing_half_written(tiny_recipe, monkeypatch):
    directory = shear(tiny_recipe, stages=("prune",))
    context = RunContext(load_recipe(tiny_recipe))
    with monkeypatch.context() as patch:
        patch.setattr("shearing.runs.stages.compact.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            compact(context)
    assert not directory.compact.exists()
    compact(context)
    assert directory.is_complete("compact")
