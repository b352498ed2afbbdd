"""States of runs as folders: the weights of the state, opened by transformers alone, described and pushed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner, Result

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.objectives.objective import PARAMETER_PREFIX
from shearing.pruning.sparse.stored.check import differences
from shearing.pruning.sparse.stored.manifest import read_manifest
from shearing.runs.export.export import export
from shearing.runs.recipe import Recipe
from shearing.runs.run_directory import RunDirectory
from shearing.runs.stages.run import run
from shearing.training.checkpoints.pieces import WEIGHT, ShardedState
from tests.conftest import tiny_recipe_data

CARD_OF_SOURCE = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- theirs\n---\n# Theirs\n"
QUIET = Console(quiet=True)


def shear(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "300"})


def ran(inputs: Path, folder: Path, **sections: Any) -> RunDirectory:
    """A run without pruning of units, from a source in bf16 with a card of its own; checkpoints at steps 2 and 4."""
    source = shutil.copytree(inputs / "model", folder / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    (source / "README.md").write_text(CARD_OF_SOURCE)
    (source / "LICENSE").write_text("terms")
    data = tiny_recipe_data(inputs, run_dir=folder / "run")
    del data["target"], data["prune"]
    data["model"]["source"] = str(source)
    data["pretrain"] |= {"checkpoint_interval": "2 steps", "keep_last": 4, "learning_rate": 1e-2}
    data["pretrain"] |= sections.pop("pretrain", {})
    recipe = Recipe.model_validate({**data, **sections})
    return run(recipe, stages=[stage for stage in recipe.stages if stage != "evaluate"])


@pytest.fixture(scope="module")
def dense(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return ran(tiny_inputs, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def adapted(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Sparse, with adapters."""
    pytest.importorskip("peft")
    sections = {"sparsify": {"criterion": "magnitude", "pattern": "2:4"}, "pretrain": {"lora": {"rank": 2}}}
    return ran(tiny_inputs, tmp_path_factory.mktemp("adapted"), **sections)


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name.removeprefix(PARAMETER_PREFIX): weight for name, weight in ShardedState(checkpoint).whole(WEIGHT)}


def step(run: RunDirectory, number: int) -> Path:
    return run.checkpoints("pretrain") / f"step-{number:08d}"


@torch.no_grad()
def logits(weights: dict[str, torch.Tensor], *, config: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config)).float().eval()
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model(torch.arange(18)[None]).logits


@pytest.mark.parametrize("number", [2, 4])
def test_a_checkpoint_in_fp32_is_the_state_bit_for_bit(number: int, dense: RunDirectory, tmp_path: Path) -> None:
    made = export(str(step(dense, number)), output=tmp_path / "out", dtype="fp32", console=QUIET)
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), state(step(dense, number))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert (made.difference, made.rounding) == (0.0, 0.0)
    with torch.no_grad():
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(18)[None]).logits
    assert torch.equal(opened, logits(expected, config=dense.model))


def test_a_run_is_its_newest_state_in_the_dtype_of_the_source(dense: RunDirectory, tmp_path: Path) -> None:
    made = export(str(dense.path), output=tmp_path / "out", shard_bytes=6_000, console=QUIET)
    assert made.dtype == "bf16"
    assert 0 < made.rounding < 0.05
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: weight for file in files for name, weight in load_file(file).items()}
    expected = load_file(dense.model / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert made.difference == pytest.approx(made.rounding, rel=1e-3)
    assert not list(tmp_path.glob(".*"))


def test_a_run_whose_checkpoints_are_gone_is_its_model(dense: RunDirectory, tmp_path: Path) -> None:
    moved = shutil.copytree(dense.path, tmp_path / "moved")
    shutil.rmtree(moved / "pretrain" / "checkpoints")
    export(str(moved), output=tmp_path / "out", console=QUIET)
    expected = (dense.model / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


def test_damage_is_passed_over_in_a_run_and_refused_where_it_is_named(dense: RunDirectory, tmp_path: Path) -> None:
    moved = RunDirectory(shutil.copytree(dense.path, tmp_path / "moved"))
    shard = next(step(moved, 4).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-3])
    with pytest.raises(ShearingError, match="a checkpoint that is whole"):
        export(str(step(moved, 4)), output=tmp_path / "out", console=QUIET)
    export(str(moved.path), output=tmp_path / "out", dtype="fp32", console=QUIET)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in state(step(dense, 2)).items())


@pytest.mark.parametrize("number", [2, 4])
def test_adapters_are_merged_and_zeros_stay(number: int, adapted: RunDirectory, tmp_path: Path) -> None:
    made = export(str(step(adapted, number)), output=tmp_path / "out", dtype="fp32", console=QUIET)
    assert made.difference < 1e-5
    assert made.rounding < 1e-5
    assert differences(tmp_path / "out") == []
    said = read_manifest(tmp_path / "out")["trained"]
    assert [each["steps"] for each in said] == [number]
    if number == 4:
        found, kept = (load_file(of / "model.safetensors") for of in (tmp_path / "out", adapted.model))
        assert all(torch.equal(weight, found[name].bfloat16()) for name, weight in kept.items())


def test_a_folder_of_a_sparse_model_keeps_masks_and_a_true_manifest(adapted: RunDirectory, tmp_path: Path) -> None:
    export(str(adapted.sparse), output=tmp_path / "out", dtype="fp16", console=QUIET)
    assert differences(tmp_path / "out") == []
    assert "trained" not in read_manifest(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == CARD_OF_SOURCE


def test_what_computes_something_else_is_refused(
    dense: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shearing.models.stored import saving
    from shearing.runs.export import export as exporting

    def damaged(model: Any, folder: Path, **settings: Any) -> None:
        saving.write_model(model, folder, **settings)
        said = json.loads((folder / "config.json").read_text())
        said["rope_parameters"]["rope_theta"] = said["rope_theta"] = 77.0
        (folder / "config.json").write_text(json.dumps(said))

    monkeypatch.setattr(exporting, "write_model", damaged)
    with pytest.raises(ShearingError, match="logits differ by"):
        export(str(dense.path), output=tmp_path / "out", console=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("no/such", [], "no/such"),
        ("{run}", ["--dtype", "int8"], "fp32, bf16, fp16"),
        ("{run}", ["--shard-size", "some"], "'5 GB'"),
        ("{run}", ["--push", "a/b/c"], "NAME or ORGANISATION/NAME"),
        ("{run}", ["-o", "{run}"], "does not exist yet"),
        ("{run}/pretrain", [], "a checkpoint of continued pretraining"),
    ],
)
def test_what_cannot_be_exported(
    target: str, options: list[str], said: str, dense: RunDirectory, tmp_path: Path
) -> None:
    named = [each.format(run=dense.path) for each in (target, *options)]
    output = [] if "-o" in options else ["-o", tmp_path / "out"]
    result = shear("export", *named, *output)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_mask_learning_is_told_what_comes_first(dense: RunDirectory, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(step(dense, 2), tmp_path / "run" / "prune" / "checkpoints" / "step-00000002")
    with pytest.raises(ShearingError, match="shear compact"):
        export(str(checkpoint), output=tmp_path / "out", console=QUIET)


def test_the_card_says_what_is_known_and_nothing_of_this_machine(dense: RunDirectory, tmp_path: Path) -> None:
    export(str(dense.path), output=tmp_path / "out", console=QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [],
    }
    samples = dense.read_complete("pretrain")["samples"]
    for part in (
        "It is the state after step 4 of 4.",
        "made of `source` with shearing",
        "128 tokens in 4 steps, learning rate 0.01, schedule cosine",
        *(f"| {domain} | {count * 16:,} |" for domain, count in samples.items()),
        "This state was not measured.",
        "The source's own terms are in LICENSE.",
        "  sequence_length: 16\n",
    ):
        assert part in card, part
    assert "| source | " in card
    assert str(dense.path.parent) not in card
    assert "tmp" not in card
    assert (tmp_path / "out" / "README.source.md").read_text() == CARD_OF_SOURCE
    half = export(str(step(dense, 2)), output=tmp_path / "half", console=QUIET)
    assert "the state after step 2 of 4" in (half.folder / "README.md").read_text()


def test_the_card_of_a_sparse_model_with_adapters(adapted: RunDirectory, tmp_path: Path) -> None:
    made = export(str(step(adapted, 2)), output=tmp_path / "out", console=QUIET)
    card = (made.folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["sparse"]
    assert "- Zeros: criterion magnitude, pattern 2:4; kept while training." in card
    assert "schedule cosine, low-rank adapters merged." in card


def test_a_dry_run_pushes_nothing(dense: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("the hub was asked"))
    result = shear("export", dense.path, "-o", tmp_path / "out", "--push", "me/small", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "would be pushed to me/small:" in result.stdout
    for path in (tmp_path / "out").iterdir():
        assert f"{path.stat().st_size:,} bytes  {path.name}" in result.stdout
    assert "does not suit tensor parallelism over 8 GPUs: no equal shares of num_attention_heads 4" in result.stdout


@pytest.mark.parametrize(
    ("options", "without"),
    [(["--corpus", "x"], "--vocab-size"), (["--dry-run"], "--push"), (["--private"], "--push")],
)
def test_options_that_mean_nothing_alone_are_refused(
    options: list[str], without: str, dense: RunDirectory, tmp_path: Path
) -> None:
    result = shear("export", dense.path, "-o", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert f"nothing without {without}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_push_makes_the_repository_and_uploads_the_folder(
    dense: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        commit_url = "https://hub/me/small/commit/1"

        def create_repo(self, name: str, **settings: Any) -> None:
            calls.append((name, settings))

        def upload_folder(self, **settings: Any) -> Hub:
            calls.append(("upload", settings))
            return self

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    made = export(str(dense.path), output=tmp_path / "out", repository="me/small", private=True, console=QUIET)
    assert made.address == Hub.commit_url
    assert calls == [
        ("me/small", {"private": True, "exist_ok": True}),
        ("upload", {"folder_path": tmp_path / "out", "repo_id": "me/small", "commit_message": "tiny, step 4, in bf16"}),
    ]


def test_a_hub_that_cannot_be_reached_leaves_the_folder(dense: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(ShearingError, match=r"hf upload me/small") as caught:  # HF_HUB_OFFLINE
        export(str(dense.path), output=tmp_path / "out", repository="me/small", console=QUIET)
    assert caught.value.field == "--push"
    assert (tmp_path / "out" / "model.safetensors").is_file()
