"""Sources whose files are not exactly their config's are refused by their headers, before any weight is loaded."""

from __future__ import annotations

import json
import re
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from shearing.errors import ShearingError
from shearing.models import loading
from shearing.models.loading import load_config, load_source, require_weights
from shearing.models.stored import headers
from shearing.models.stored.stored_model import open_source
from tests.models.tiny import CONFIGS, tiny_model

HEAD, EMBEDDING, UP = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def saved(folder: Path, *, tied: bool = True, family: str = "llama") -> Path:
    tiny_model(family, tied=tied).save_pretrained(folder)
    return folder


def changed(folder: Path, change: Change) -> Path:
    path = folder / "model.safetensors"
    save_file({name: of.clone() for name, of in change(load_file(path)).items()}, path, metadata={"format": "pt"})
    return folder


def configured(folder: Path, **values: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def refused_by_all(folder: Path, said: str, *, tmp_path: Path) -> ShearingError:
    """Every way to open a source refuses it in the same words, none of which loads it."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    errors = []
    for opened in (
        lambda: require_weights(str(folder)),
        lambda: load_source(str(folder)),
        lambda: open_source(str(folder), revision=None, converted=tmp_path / "converted"),
    ):
        with (
            unittest.mock.patch.object(AutoModelForCausalLM, "from_pretrained", refuse),
            pytest.raises(ShearingError, match=re.escape(said)) as raised,
        ):
            opened()
        errors.append(raised.value)
    assert len({error.mend.replace("model", "source") for error in errors}) == 1
    assert not (tmp_path / "converted").exists()
    return errors[0]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_is_accepted(family: str, tied: bool, tmp_path: Path) -> None:
    require_weights(str(saved(tmp_path / "model", tied=tied, family=family)))


def test_what_the_published_pythias_hold_beside_weights_is_no_weight(tmp_path: Path) -> None:
    """Masks of the attention and frequencies, which follow from the config."""

    def with_buffers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for layer in range(4):
            attention = f"gpt_neox.layers.{layer}.attention"
            tensors[f"{attention}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
            tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(2)
        return tensors

    folder = changed(saved(tmp_path / "model", tied=False, family="gpt_neox"), with_buffers)
    source = open_source(str(folder), revision=None, converted=tmp_path / "converted")
    assert source.folder == folder
    head = source.read(["lm_head.weight"])["lm_head.weight"]
    assert torch.equal(head, load_source(str(folder)).lm_head.weight)


def test_shards_are_accepted_and_a_missing_one_is_named(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 2
    require_weights(str(tmp_path / "model"))
    (tmp_path / "model" / shards[1]).unlink()
    refused_by_all(tmp_path / "model", f"without {shards[1]}", tmp_path=tmp_path)


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(tmp_path: Path) -> None:
    folder = configured(saved(tmp_path / "model", tied=False), tie_word_embeddings=True)
    error = refused_by_all(folder, f"{HEAD} is not {EMBEDDING}", tmp_path=tmp_path)
    assert "set tie_word_embeddings to false" in error.mend
    require_weights(str(configured(folder, tie_word_embeddings=False)))


def test_one_different_number_makes_a_head_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_ROWS_AT_ONCE", 7)

    def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, HEAD: tensors[EMBEDDING].clone()}

    folder = changed(saved(tmp_path / "model"), with_head)
    require_weights(str(folder))  # twice the same is tied

    def with_another(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[HEAD][-1, -1] += 1
        return tensors

    refused_by_all(changed(folder, with_another), f"{HEAD} is not", tmp_path=tmp_path)


def test_only_the_head_of_tied_weights_is_enough(tmp_path: Path) -> None:
    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[HEAD] = tensors.pop(EMBEDDING)
        return tensors

    require_weights(str(changed(saved(tmp_path / "model"), renamed)))


def test_biases_that_the_config_does_not_know_are_named(tmp_path: Path) -> None:
    folder = configured(saved(tmp_path / "model", family="llama-biases"), attention_bias=False, mlp_bias=False)
    error = refused_by_all(folder, "model.layers.0.mlp.down_proj.bias", tmp_path=tmp_path)
    assert "attention_bias or mlp_bias" in error.mend
    require_weights(str(configured(folder, attention_bias=True, mlp_bias=True)))


@pytest.mark.parametrize(
    ("change", "said", "mend"),
    [
        (
            lambda t: {**t, "model.layers.9.mlp.up_proj.weight": t[UP]},
            "model.layers.9.mlp.up_proj.weight",
            "config.json",
        ),
        (lambda t: {**t, "model.layers.1.mlp.up_proj.weight_scale": t[UP][:1]}, "up_proj.weight_scale", "quantised"),
        (lambda t: {name: of for name, of in t.items() if name != UP}, f"['{UP}']", "incomplete"),
        (lambda t: {**t, UP: t[UP][:-1].contiguous()}, f"parameter {UP}", "another model's"),
        (lambda t: {**t, UP: t[UP].to(torch.int8)}, f"parameter {UP}) = 'I8'", "quantised from"),
        (lambda t: {**t, UP: t[UP].to(torch.float8_e4m3fn)}, "'F8_E4M3'", "quantised from"),
    ],
    ids=["a layer too many", "scales", "a weight too few", "another shape", "int8", "fp8"],
)
def test_weights_of_another_config_are_named(change: Change, said: str, mend: str, tmp_path: Path) -> None:
    error = refused_by_all(changed(saved(tmp_path / "model"), change), said, tmp_path=tmp_path)
    assert mend in error.mend


def test_names_without_the_backbones_are_known(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = load_source(str(folder)).state_dict()
    changed(folder, lambda tensors: {name.removeprefix("model."): of for name, of in tensors.items()})
    require_weights(str(folder))
    found = load_source(str(folder)).state_dict()
    assert all(torch.equal(found[name], of) for name, of in expected.items())


def test_what_follows_from_the_config_may_lie_beside_the_weights(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    require_weights(str(changed(saved(tmp_path / "model"), lambda tensors: {**tensors, **extra})))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "from_pretrained('SOURCE'"),
        ("consolidated.safetensors", "convert"),
        ("", "fetch"),
    ],
)
def test_weights_in_other_files_are_refused(name: str, said: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.rename(folder / name) if name else weights.unlink()
    error = refused_by_all(folder, name or "no weights", tmp_path=tmp_path)
    assert said in error.mend.replace(str(folder), "SOURCE")


def test_the_conversion_that_the_message_gives_is_one(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    expected = load_file(folder / "model.safetensors")
    torch.save(expected, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ShearingError) as raised:
        require_weights(str(folder))
    [program] = re.findall(r'python -c "(.*?)"', raised.value.mend)
    exec(program.replace("NEW", str(tmp_path / "new")))
    require_weights(str(tmp_path / "new"))
    found = load_file(tmp_path / "new" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "unheard of"}},
    ],
)
def test_quantised_sources_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    refused_by_all(configured(saved(tmp_path / "model"), **values), "which is quantised", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": 35}, "multiple of the number of attention heads"),
        ({"num_attention_heads": 0}, "zero"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "Missing required keys"),
        ({"rope_parameters": {"rope_type": "unheard of"}}, "unheard of"),
        ({"hidden_act": "unheard of"}, "unheard of"),
        ({"pad_token_id": 10_000}, "Padding_idx"),
    ],
)
def test_a_config_that_transformers_refuses_is_one_message(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = configured(saved(tmp_path / "model"), **values)
    error = refused_by_all(folder, said, tmp_path=tmp_path)
    assert error.field == "source (config.json)"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ShearingError, match=r"a whole safetensors file\n.* of a run's compact/, remove that folder"):
        require_weights(str(folder))


def test_files_of_a_name_on_the_hub_are_looked_at_where_they_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(saved(tmp_path / "model"), lambda t: {**t, "extra": t[UP]})
    config = load_config(str(folder))
    here: list[Path | None] = [None, tmp_path, folder]
    monkeypatch.setattr(loading, "load_config", lambda *_, **__: config)
    monkeypatch.setattr(loading, "folder_here", lambda *_, **__: here[0])
    require_weights("owner/name")  # nothing is here
    here[0] = tmp_path
    require_weights("owner/name")  # its weights are not
    here[0] = folder
    with pytest.raises(ShearingError, match="owner/name with extra"):
        require_weights("owner/name")
