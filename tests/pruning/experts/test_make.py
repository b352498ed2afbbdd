"""A dense model as a mixture of experts: with all of them active it is the dense model, as any reader opens it."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.files.tensors import read_header
from shearing.models.stored.saving import save_model
from shearing.pruning.experts import make
from shearing.pruning.experts.make import find_experts, make_experts, mixture_config, mixture_of
from shearing.pruning.experts.recipe import MoeRecipe
from shearing.pruning.experts.split import SPREAD, by_coactivation
from shearing.pruning.sparse.one_shot import sparsify
from shearing.pruning.sparse.recipe import SparsifyRecipe
from tests.models.tiny import tiny_ids, tiny_model


def recipe(**changes: Any) -> MoeRecipe:
    return MoeRecipe.model_validate(
        {"model": "none", "output": "none", "calibration": ["none"], "experts": 5, "active": 5, **changes}
    )


@pytest.mark.parametrize("split", ["coactivation", "random"])
@pytest.mark.parametrize("family", ["llama", "llama-rope-scaling", "mistral", "qwen3"])
def test_all_experts_are_the_dense_model(family: str, split: str) -> None:
    dense = tiny_model(family)
    layers = find_experts(dense, tokens=tiny_ids(), recipe=recipe(split=split))
    mixture = mixture_of(dense, config=mixture_config(dense.config, experts=5, active=5), layers=layers)
    ids = tiny_ids(seed=5)
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    for layer in layers:
        assert sorted(layer.groups.flatten().tolist()) == list(range(dense.config.intermediate_size))
        assert layer.strength == 1.0
        assert layer.error < 1e-5


def test_a_mixture_of_few_keeps_the_norm_of_what_it_adds() -> None:
    dense, ids = tiny_model("llama"), tiny_ids()
    settings = recipe(experts=5, active=2)
    layers = find_experts(dense, tokens=ids, recipe=settings)
    mixture = mixture_of(dense, config=mixture_config(dense.config, experts=5, active=2), layers=layers)
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, arguments, output: seen.update({name: output, f"{name} in": arguments[0]})

    first: Any = dense.model.layers[0].mlp
    mixed: Any = mixture.model.layers[0].mlp
    first.register_forward_hook(keep("dense"))
    mixed.register_forward_hook(keep("mixture"))
    with torch.no_grad():
        dense(ids), mixture(ids)
    assert torch.equal(seen["dense in"], seen["mixture in"])
    assert float(seen["mixture"].norm() / seen["dense"].norm()) == pytest.approx(1.0, abs=0.02)
    # One token after the other, from the formula: the sum of what the two experts of highest logits add.
    x, whole = seen["dense in"].flatten(0, 1), seen["mixture"].flatten(0, 1)
    for token, output in zip(x, whole, strict=True):
        chosen = (layers[0].router @ token).topk(2).indices.tolist()
        units = torch.cat([layers[0].groups[each] for each in chosen])
        h = torch.nn.functional.silu(first.gate_proj.weight[units] @ token) * (first.up_proj.weight[units] @ token)
        expected = layers[0].strength * (first.down_proj.weight[:, units] @ h)
        torch.testing.assert_close(output, expected, rtol=0.05, atol=0.02 * float(expected.detach().abs().max()))
    logits = x @ layers[0].router.t()
    assert float(logits.std()) == pytest.approx(SPREAD, rel=1e-3)


def test_text_may_go_through_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, ids = tiny_model("qwen3"), tiny_ids(sequences=5, length=24)
    sizes: list[int] = []
    first: Any = dense.model.layers[0].mlp
    first.register_forward_pre_hook(lambda _, arguments: sizes.append(len(arguments[0])))
    whole = find_experts(dense, tokens=ids, recipe=recipe(active=2))
    monkeypatch.setattr(make, "CHUNK_TOKENS", 50)
    parts = find_experts(dense, tokens=ids, recipe=recipe(active=2))
    assert sizes == [5, 2, 2, 1]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.groups, other.groups)
        torch.testing.assert_close(one.router, other.router)


def test_documents_of_a_named_field(tiny_inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": "abcd" * 20}) for _ in range(9)))
    arguments = ["moe", str(tiny_inputs / "model"), "--experts", "6", "--active", "2", "-o", str(tmp_path / "out")]
    arguments += ["--calibration", str(tmp_path / "a.jsonl"), "--samples", "4", "--seqlen", "16"]
    assert "--text-field" in CliRunner().invoke(app, arguments).stderr
    result = CliRunner().invoke(app, [*arguments, "--text-field", "body"])
    assert result.exit_code == 0, result.output


def test_units_that_are_active_together_stay_together() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, (200,), generator=generator)
    order = torch.randperm(12, generator=generator)
    kinds = torch.arange(12)[order] % 3
    activations = (tokens[:, None] == kinds) * torch.rand(200, 12, generator=generator)
    groups = by_coactivation(activations, experts=3, generator=torch.Generator().manual_seed(1))
    assert {frozenset(kinds[units].tolist()) for units in groups} == {frozenset({kind}) for kind in range(3)}


def test_the_command_writes_a_model_that_any_reader_opens(tiny_inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "mixture"
    arguments = ["moe", str(tiny_inputs / "model"), "--experts", "6", "--active", "6", "-o", str(output)]
    arguments += ["--calibration", str(tiny_inputs / "corpus"), "--samples", "4", "--seqlen", "16"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"{output} is written: 6 experts of 8 units, 6 active" in result.output
    assert f"model.source={output}" in result.output
    mixture = AutoModelForCausalLM.from_pretrained(output)
    dense = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model")
    assert type(mixture).__name__ == "MixtralForCausalLM"
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        torch.testing.assert_close(mixture(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(output).encode("ab01")
    assert len(json.loads((output / "experts.json").read_text())["layers"]) == 4
    again = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert again.exit_code == 2
    assert "--output" in again.stderr


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen2", {}, "there is no mixture of other kinds"),
        ("llama-biases", {}, "llama with attention_bias with mlp_bias"),
        ("llama", {"experts": 3}, "shares 40 units out by multiples of 8.*: 5"),
    ],
)
def test_what_cannot_be_is_said(family: str, changes: dict[str, int], said: str) -> None:
    with pytest.raises(ShearingError, match=said):
        mixture_config(tiny_model(family).config, **{"experts": 5, "active": 2, **changes})


def test_more_active_than_there_are(tmp_path: Path) -> None:
    arguments = ["moe", "model", "-o", str(tmp_path / "x"), "--experts", "2", "--active", "3", "--calibration", "c"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert "at most the 2 experts" in result.stderr


def test_text_longer_than_the_model_reads(tiny_inputs: Path, tmp_path: Path) -> None:
    settings = recipe(
        model=str(tiny_inputs / "model"), output=tmp_path / "out", experts=6, seqlen=65, calibration=[tmp_path]
    )
    with pytest.raises(ShearingError, match="at most 64, what the model can read") as raised:
        make_experts(settings, console=Console(quiet=True))
    assert raised.value.field == "seqlen"


def test_a_model_of_the_hub_keeps_the_dtype_of_its_weights(
    tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    dense = AutoModelForCausalLM.from_pretrained(tiny_inputs / "model", dtype=torch.bfloat16)
    save_model(dense, commit, like=str(tiny_inputs / "model"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    settings = recipe(
        model="owner/name",
        output=tmp_path / "out",
        experts=6,
        samples=4,
        seqlen=16,
        calibration=[tiny_inputs / "corpus"],
    )
    make_experts(settings, console=Console(quiet=True))
    entries, _ = read_header(tmp_path / "out" / "model.safetensors")
    assert {entry.dtype for entry in entries.values()} == {"BF16"}


def test_that_masks_are_lost_is_said(tiny_inputs: Path, tmp_path: Path) -> None:
    source = tiny_inputs / "model"
    one_shot = {"model": str(source), "output": tmp_path / "sparse", "criterion": "magnitude", "pattern": "2:4"}
    sparsify(SparsifyRecipe.model_validate({**one_shot, "device": "cpu"}), console=Console(quiet=True))
    told = {"experts": 6, "samples": 4, "seqlen": 16, "calibration": [tiny_inputs / "corpus"]}
    for model in (source, tmp_path / "sparse"):
        console = Console(record=True, file=io.StringIO())
        make_experts(recipe(model=str(model), output=tmp_path / f"{model.name} mixed", **told), console=console)
        assert (f"masks of {model} are not kept" in console.export_text()) == (model != source)


def test_a_full_disk_is_said_of_the_output(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shearing.models.stored.saving.write_model", full)
    settings = recipe(
        model=str(tiny_inputs / "model"),
        output=tmp_path / "out",
        experts=6,
        samples=4,
        seqlen=16,
        calibration=[tiny_inputs / "corpus"],
    )
    with pytest.raises(ShearingError, match=r"output = .* GB free"):
        make_experts(settings, console=Console(quiet=True))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_left(tiny_inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    settings = recipe(model=str(tiny_inputs / "model"), output=tmp_path / "there")
    with pytest.raises(ShearingError, match="there"):
        make_experts(settings, console=Console(quiet=True))
