"""Models with experts through the stages as a user runs them: learned, cut, trained on, evaluated; and one-shot."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig

import shearing
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.experts.make import make_experts
from shearing.pruning.experts.recipe import MoeRecipe
from shearing.pruning.sparse.stored.masks import FILE_NAME, read_masks
from shearing.runs.stages.run import run

SIZES = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 3, "num_experts": 6}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}
TARGET = [
    "target.num_hidden_layers=2",
    "target.hidden_size=24",
    "target.intermediate_size=8",
    "target.num_attention_heads=null",
    "target.num_key_value_heads=null",
    "target.num_experts=3",
    "prune.granularities=[layers, intermediate, experts, hidden]",
]


@pytest.fixture(scope="module")
def experts(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with the tokenizer of the tiny corpus."""
    folder = tmp_path_factory.mktemp("experts") / "model"
    shutil.copytree(tiny_inputs / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    vocab_size = AutoConfig.from_pretrained(tiny_inputs / "model").vocab_size
    config = Qwen3MoeConfig(**SIZES, **HEADS, vocab_size=vocab_size, norm_topk_prob=True, tie_word_embeddings=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_a_run_from_masks_to_the_report(tiny_recipe: Path, experts: Path) -> None:
    recipe = shearing.load_recipe(tiny_recipe, overrides=[f"model.source={experts}", *TARGET])
    shearing.run(recipe)
    folder = recipe.run_dir
    sizes = json.loads((folder / "compact" / "shape.json").read_text())
    assert sizes["target"]["num_experts"] == 3
    assert sizes["relative_logit_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    shape = Shape.of(model.config)
    assert (shape.num_experts, shape.intermediate_size, shape.hidden_size) == (3, 8, 24)
    assert shape.num_parameters() == sum(p.numel() for p in model.parameters())
    assert "model.layers.1.mlp.experts.2.up_proj.weight" in load_file(folder / "model" / "model.safetensors")
    kept = json.loads((folder / "prune" / "summary.json").read_text())["kept"]
    assert (kept["experts"], kept["intermediate"]) == (3, 8)
    assert "experts" in (folder / "report.html").read_text()


def test_zeros_of_experts_stay_in_training(tiny_recipe: Path, experts: Path) -> None:
    content = yaml.safe_load(tiny_recipe.read_text())
    content = {name: section for name, section in content.items() if name not in ("target", "prune", "evaluation")}
    content["sparsify"] = {"criterion": "wanda", "pattern": "2:4", "samples": 4, "seqlen": 16}
    tiny_recipe.write_text(yaml.safe_dump(content))
    recipe = shearing.load_recipe(tiny_recipe, overrides=[f"model.source={experts}"])
    run(recipe, stages=("sparsify", "pretrain"))
    masks = dict(read_masks(recipe.run_dir / "model" / FILE_NAME))
    weights = load_file(recipe.run_dir / "model" / "model.safetensors")
    assert len([name for name in masks if ".experts." in name]) == 3 * 6 * 3
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        assert weights[name][mask].count_nonzero() > 0


def test_a_dense_model_made_a_mixture_is_trained_on_with_balance(
    tiny_inputs: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    mixture = tmp_path / "mixture"
    made = MoeRecipe(
        model=str(tiny_inputs / "model"),
        output=mixture,
        experts=6,
        active=2,
        calibration=[str(tiny_inputs / "corpus")],
        samples=4,
        seqlen=16,
    )
    make_experts(made, console=Console(quiet=True))
    content = yaml.safe_load(tiny_recipe.read_text())
    content = {name: section for name, section in content.items() if name not in ("target", "prune", "evaluation")}
    tiny_recipe.write_text(yaml.safe_dump(content))
    recipe = shearing.load_recipe(tiny_recipe, overrides=[f"model.source={mixture}"])
    run(recipe, stages=("pretrain",))
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (mixture, recipe.run_dir / "model"))
    assert type(after).__name__ == "MixtralForCausalLM"
    routers = [name for name, _ in after.named_parameters() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    assert all(not torch.equal(before.get_parameter(name), after.get_parameter(name)) for name in routers)


def test_what_cannot_be_is_said_before_any_work(tiny_recipe: Path, experts: Path) -> None:
    wrong = [*TARGET, "target.num_experts=1", "training.compile=true", "prune.initial_masks=policy_gradient"]
    recipe = shearing.load_recipe(tiny_recipe, overrides=[f"model.source={experts}", *wrong])
    with pytest.raises(ShearingError) as caught:
        run(recipe)
    for said in ("num_experts", "training.compile", "not made of experts"):
        assert said in str(caught.value)
    moving = yaml.safe_load(tiny_recipe.read_text()) | {"sparsify": {"criterion": "magnitude", "pattern": "2:4"}}
    moving["pretrain"]["ast"] = {}
    sparse = tiny_recipe.with_name("sparse.yaml")
    sparse.write_text(yaml.safe_dump({name: moving[name] for name in moving if name not in ("target", "prune")}))
    with pytest.raises(ShearingError, match=r"pretrain\.ast .*qwen3_moe[\s\S]*masks that stay work with experts"):
        run(shearing.load_recipe(sparse, overrides=[f"model.source={experts}"]))
    dense = shearing.load_recipe(tiny_recipe, overrides=["prune.granularities=[layers, experts, hidden]"])
    with pytest.raises(ShearingError, match="without 'experts'"):
        run(dense)
