"""Runs of families that are not like Llama, and of sizes that Llama's config refuses, as people type them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from shearing.cli.frame import app
from tests.conftest import tiny_recipe_data
from tests.models.tiny import tiny_model

SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2}


def shear(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    return result.output


def recipe(inputs: Path, folder: Path, *, family: str | None, **changes: int) -> Path:
    """A recipe whose source is of a family; None: the Llama of other tests."""
    source = shutil.copytree(inputs / "model", folder / "source")
    if family is not None:
        words = json.loads((source / "config.json").read_text())["vocab_size"]
        model = tiny_model(family, tied=False, vocab_size=words, eos_token_id=1, bos_token_id=None)
        model.save_pretrained(source)
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    data["model"]["source"] = str(source)
    data["target"] = SIZES | changes
    data["prune"]["granularities"] = ["layers", "kv_groups", "query_heads", "intermediate", "hidden"]
    data["sparsify"] = {"criterion": "wanda", "sparsity": 0.5, "samples": 4, "seqlen": 16}
    data["evaluation"]["baselines"] = ["reconstruction+refit"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("family", ["gpt_neox", "phi3-longrope"])
def test_a_whole_run_and_what_is_exported_of_it(family: str, tiny_inputs: Path, tmp_path: Path) -> None:
    heads = 2 if family == "gpt_neox" else 4
    path = recipe(tiny_inputs, tmp_path, family=family, hidden_size=heads * 8)
    said = shear("plan", path)
    assert f"hidden {heads * 8}" in said
    said = shear("run", path)
    assert "architecture:" not in said
    run = tmp_path / "run"
    shape = json.loads((run / "compact" / "shape.json").read_text())
    assert shape["relative_logit_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert model.config.hidden_size == heads * 8
    assert sum(parameter.numel() for parameter in model.parameters()) == shape["target"]["parameters"]
    zeros = {name: float((weight == 0).float().mean()) for name, weight in model.named_parameters() if "mlp" in name}
    assert all(share == 0.5 for name, share in zeros.items() if name.endswith("weight"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "reconstruction+refit" in evaluation["models"]
    shear("export", run, "-o", tmp_path / "out")
    assert "Stored as" not in (tmp_path / "out" / "README.md").read_text()
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("embed_out.weight" in stored) == (family == "gpt_neox")


def test_sizes_that_llama_refuses_are_said_wherever_a_result_is(tiny_inputs: Path, tmp_path: Path) -> None:
    path = recipe(tiny_inputs, tmp_path, family=None, hidden_size=15, num_key_value_heads=1)
    sentence = "written as MistralForCausalLM, which computes the same"
    assert sentence in shear("config", "check", path)
    said = shear("run", path)
    assert said.count(sentence) == 3  # before it begins, where it is cut, among the results
    compact = tmp_path / "run" / "compact"
    shape = json.loads((compact / "shape.json").read_text())
    assert shape["architecture"] == "MistralForCausalLM"
    assert shape["source_architecture"] == "LlamaForCausalLM"
    assert shape["relative_logit_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "MistralForCausalLM"
    assert (model.config.hidden_size, model.config.num_attention_heads, model.config.head_dim) == (15, 2, 8)
    shear("export", tmp_path / "run", "-o", tmp_path / "out")
    assert "Stored as `mistral`" in (tmp_path / "out" / "README.md").read_text()
