"""An export is the same model, with the list of what to convert: all of it, or nothing."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.files.durable import locked, read_json
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.pruning.sparse.semi_structured import hardware as hardware_module
from shearing.pruning.sparse.semi_structured.export import export
from shearing.pruning.sparse.semi_structured.layout import has_negative_zeros
from tests.pruning.sparse.semi_structured.pretended import (
    Converted,
    pretended,
    seconds,
    small_config,
    two_of_four_model,
)

LAYERS, OF_A_LAYER = 2, 7
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2:4 model with negative zeros, made by no command of ours."""
    return two_of_four_model(tmp_path_factory.mktemp("model") / "sparse")


def exported(model: Path, output: Path, **options: Any) -> tuple[dict[str, Any], str]:
    """What was written about it, and what was said."""
    text = io.StringIO()
    console = Console(file=text, width=80)
    options = {"hardware": pretended(), "batches": [8, 64], **options}
    export(str(model), output=output, console=console, **options)
    return read_json(output / "semi_structured.json"), text.getvalue()


def error_of(model: Path, output: Path, **options: Any) -> ShearingError:
    before = sorted(output.parent.iterdir())
    with pytest.raises(ShearingError) as raised:
        exported(model, output, **options)
    assert sorted(output.parent.iterdir()) == before
    return raised.value


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_only_layers_that_gain_at_every_size_are_kept(model: Path, tmp_path: Path) -> None:
    manifest, said = exported(model, tmp_path / "out", batches=[64, 1, 64])
    assert manifest["batches"] == [1, 64]
    # A converted call costs two microseconds more: at one token only the largest layers make up for that.
    assert {name.rpartition(".")[2] for name in manifest["layers"]} == set(MLP)
    gain = {name: seconds(torch.empty(64, rows), 1) for name, rows in (("q_proj", 64), ("k_proj", 32))}
    for name, dense in gain.items():
        about = manifest["dense"][f"model.layers.0.self_attn.{name}"]
        assert about["reason"] == "not faster: less than 1.05 times as fast as dense"
        assert about["ratios"]["1"] == pytest.approx(dense / (dense / 2 + 2e-6), abs=1e-4)
        assert about["ratios"]["64"] > 1.5
    assert "dense: not faster" in said
    assert "6 of 14 linear layers are faster as 2:4" in said


def test_layers_that_gain_are_listed_with_their_ratios(model: Path, tmp_path: Path) -> None:
    manifest, said = exported(model, tmp_path / "out")
    assert (manifest["precision"], manifest["batches"], manifest["margin"]) == ("bf16", [8, 64], 0.05)
    assert manifest["measured"]["device"] == "Pretended GPU"
    assert manifest["measured"]["torch"] == torch.__version__
    dense = seconds(torch.empty(32, 64), 8)
    assert len(manifest["layers"]) == LAYERS * OF_A_LAYER
    assert manifest["layers"]["model.layers.1.self_attn.k_proj"] == {
        "shape": [32, 64],
        "backend": "cusparselt",
        "ratios": {"8": round(dense / (dense / 2 + 2e-6), 4), "64": pytest.approx(1.94, abs=0.01)},
    }
    assert manifest["dense"] == {}
    assert "14 of 14 linear layers are faster as 2:4" in said


def test_the_files_are_the_models_own(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for path in model.iterdir():
        shutil.copyfile(path, tmp_path / "model" / path.name)
    for stale in ("sparsity.json", "evaluation.json", "semi_structured.json"):
        (tmp_path / "model" / stale).write_text("{}")
    output = tmp_path / "out"
    manifest, _ = exported(tmp_path / "model", output)
    names = {"config.json", "generation_config.json", "model.safetensors", "semi_structured.json"}
    assert {path.name for path in output.iterdir()} == names
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(
        torch.equal(after[name], weight) and after[name].dtype == weight.dtype for name, weight in before.items()
    )
    signed = [name for name, weight in before.items() if has_negative_zeros(weight)]
    assert len(signed) == LAYERS * OF_A_LAYER
    assert sorted(manifest["negative_zeros"]) == sorted(signed)
    assert not any(has_negative_zeros(weight) for weight in after.values())
    ids = torch.arange(12)[None]
    loaded = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits for folder in (model, output)
    ]
    assert torch.equal(*loaded)


def test_layers_that_are_not_two_of_four_stay_dense_and_are_named(tmp_path: Path) -> None:
    folder = two_of_four_model(tmp_path / "sparse", dense=MLP)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name:
            weights[name] = weight.masked_fill(weight.eq(0), 0)
    row = weights["model.layers.1.self_attn.k_proj.weight"][3]
    row[16:20] = torch.tensor([1.0, 0.0, -1.0, 2.0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    manifest, said = exported(folder, tmp_path / "out")
    assert len(manifest["layers"]) == LAYERS * 4 - 1
    reason = "not 2:4: row 3, inputs 16 to 19: 3 are not zero"
    assert manifest["dense"]["model.layers.1.self_attn.k_proj"] == {"shape": [32, 64], "reason": reason}
    assert "model.layers.1.self_attn.k_proj.weight is not 2:4 (row 3, inputs 16 to 19: 3 are not zero)\n" in said
    assert "model.layers.0.mlp.gate_proj.weight is not 2:4 (row 0, inputs 0 to 3: 4 are not zero), and 1 more" in said
    assert {name.rpartition(".")[2] for name in manifest["dense"]} == {*MLP, "k_proj"}


def test_shapes_that_no_backend_takes_stay_dense(tmp_path: Path) -> None:
    folder = two_of_four_model(tmp_path / "sparse", config=small_config(intermediate_size=40))
    manifest, said = exported(folder, tmp_path / "out")
    assert manifest["dense"]["model.layers.0.mlp.down_proj"] == {
        "shape": [64, 40],
        "reason": "not aligned: cusparselt needs multiples of 16 outputs and 16 inputs",
    }
    assert len(manifest["layers"]) == LAYERS * 4
    assert "dense: not aligned" in said


def test_each_layer_takes_the_better_backend(model: Path, tmp_path: Path) -> None:
    hardware = pretended(backends=("cusparselt", "cutlass"))
    slow = {"cusparselt": 0.9, "cutlass": 0.5}

    class Slower(Converted):
        pass

    hardware = type(hardware)(
        hardware.device,
        hardware.name,
        {"cusparselt": lambda weight: weight.as_subclass(Slower), "cutlass": hardware.converters["cutlass"]},
        pretended(
            lambda weight, tokens: (
                weight.numel()
                * (
                    slow["cusparselt"]
                    if isinstance(weight, Slower)
                    else slow["cutlass"]
                    if isinstance(weight, Converted)
                    else 1
                )
            )
        ).stopwatch,
    )
    manifest, _ = exported(model, tmp_path / "out", hardware=hardware)
    backends = {name.rpartition(".")[2]: layer["backend"] for name, layer in manifest["layers"].items()}
    # Inputs of 96 are no multiple of CUTLASS's 64.
    assert backends == {
        **dict.fromkeys(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], "cutlass"),
        "down_proj": "cusparselt",
    }


def test_layers_with_wrong_results_stay_dense(model: Path, tmp_path: Path) -> None:
    def convert(weight: Tensor) -> Tensor:
        return (weight * (1.5 if weight.shape[1] == 96 else 1.0)).as_subclass(Converted)

    manifest, said = exported(model, tmp_path / "out", hardware=pretended(convert=convert))
    assert set(manifest["dense"]) == {f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)}
    assert manifest["dense"]["model.layers.0.mlp.down_proj"]["reason"].startswith(
        "wrong: results differ from dense ones by 50"
    )
    assert "dense: wrong" in said


def test_biases_and_another_family(tmp_path: Path) -> None:
    sizes = {key: getattr(small_config(), key) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = Qwen2Config(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    manifest, _ = exported(two_of_four_model(tmp_path / "sparse", config=config), tmp_path / "out")
    assert len(manifest["layers"]) == LAYERS * OF_A_LAYER


@pytest.mark.parametrize(
    ("stored", "asked", "precision"),
    [
        (torch.float32, "auto", "bf16"),
        (torch.float16, "auto", "fp16"),
        (torch.bfloat16, "fp16", "fp16"),
        (torch.float16, "bf16", "bf16"),
    ],
)
def test_the_precision_is_the_stored_one_unless_asked(
    stored: torch.dtype, asked: str, precision: str, tmp_path: Path
) -> None:
    folder = two_of_four_model(tmp_path / "sparse", dtype=stored)
    manifest, _ = exported(folder, tmp_path / "out", precision=asked)
    assert manifest["precision"] == precision
    assert {of.dtype for of in load_file(tmp_path / "out" / "model.safetensors").values()} == {stored}


def test_what_sparsify_writes_can_be_exported(tiny_inputs: Path, tmp_path: Path) -> None:
    recipe = SparsifyRecipe.model_validate(
        {"model": str(tiny_inputs / "model"), "output": tmp_path / "sparse", "criterion": "magnitude", "pattern": "2:4"}
    )
    sparsify(recipe, console=Console(quiet=True))
    manifest, _ = exported(tmp_path / "sparse", tmp_path / "out")
    assert not [of["reason"] for of in manifest["dense"].values() if "2:4" in of["reason"]]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_nothing_is_written_where_nothing_is_two_of_four(tmp_path: Path) -> None:
    folder = two_of_four_model(tmp_path / "dense", dense=("_proj",))
    error = error_of(folder, tmp_path / "out")
    assert error.value == "model.layers.0.self_attn.q_proj.weight, row 0, inputs 0 to 3: 4 are not zero"


def test_nothing_is_written_where_nothing_gains(model: Path, tmp_path: Path) -> None:
    error = error_of(model, tmp_path / "out", margin=1.0)
    assert (error.field, error.value) == ("--batch", [8, 64])


def test_another_process_at_work_is_left_alone(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    with locked(partial, field="output"):
        assert error_of(model, tmp_path / "out").field == "--output"
        assert list(partial.iterdir())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"batches": [0]}, "--batch"),
        ({"precision": "fp32"}, "--precision"),
        ({"backend": "triton"}, "--backend"),
        ({"margin": -0.1}, "--margin"),
        ({"margin": float("nan")}, "--margin"),
    ],
)
def test_options_are_checked(options: dict[str, Any], field: str, model: Path, tmp_path: Path) -> None:
    assert error_of(model, tmp_path / "out", **options).field == field


def test_a_folder_that_exists_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert error_of(model, tmp_path / "out").field == "--output"


def test_the_command_without_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    # Before anything is read: not even the model has to exist.
    result = shear("export", tmp_path / "none", "--semi-structured", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "no GPU that torch can use" in result.stderr
    assert "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_the_command(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shearing.pruning.sparse.semi_structured.export.find_hardware", lambda backend: pretended())
    arguments = ("--batch", "64", "--margin", "0.2", "--backend", "cusparselt", "-o", tmp_path / "out")
    result = shear("export", model, "--semi-structured", *arguments)
    assert result.exit_code == 0, result.output
    assert f"exported model: {tmp_path / 'out'}" in result.stdout
    manifest = read_json(tmp_path / "out" / "semi_structured.json")
    assert (manifest["batches"], manifest["margin"]) == ([64], 0.2)


def test_the_command_wants_the_kind_named(model: Path, tmp_path: Path) -> None:
    result = shear("export", model, "--batch", "64", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "add --semi-structured" in result.stderr
    result = shear("export", model, "--semi-structured", "--dtype", "bf16", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--dtype" in result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_export_on_this_gpu(tmp_path: Path) -> None:
    """What is faster depends on the GPU: either some layers are listed, or nothing is written."""
    try:
        here = hardware_module.find_hardware()
    except ShearingError as error:
        pytest.skip(str(error))
    config = small_config(hidden_size=2048, intermediate_size=4096, num_hidden_layers=1)
    folder, output = two_of_four_model(tmp_path / "sparse", config=config), tmp_path / "out"
    with contextlib.suppress(ShearingError):
        exported(folder, output, hardware=here, batches=[4096])
    if output.exists():
        manifest = read_json(output / "semi_structured.json")
        assert all(layer["ratios"]["4096"] > 1.05 for layer in manifest["layers"].values())
        assert not [of for of in manifest["dense"].values() if of["reason"].startswith("wrong")]
    assert not output.with_name("out.partial").exists()
