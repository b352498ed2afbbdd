"""GGUF files: transformers, which has code of its own for them, reads the same model and the same tokens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from typer.testing import CliRunner

from shearing.cli.frame import app
from shearing.errors import ShearingError
from shearing.models.stored.saving import write_model
from shearing.runs.export import gguf_file
from shearing.runs.export.export import export
from shearing.runs.export.gguf_tokenizer import vocabulary_of
from tests.models.tiny import CONFIGS, tiny_model
from tests.runs.export.tokenizers import BYTE_LEVEL, TEXTS, write_tokenizer

gguf = pytest.importorskip("gguf")

KNOWN = [family for family in sorted(CONFIGS) if not family.startswith(("gpt_neox", "phi3", "seed_oss"))]
QUIET = Console(quiet=True)
ROWS = 416
IDS = torch.arange(40).view(2, 20) * 9 % ROWS


def written(folder: Path, *, family: str = "llama", name: str = "gpt-2", **sizes: Any) -> PreTrainedModel:
    """A tiny model with a tokenizer, as a folder."""
    model = tiny_model(family, vocab_size=ROWS, **sizes)
    write_model(model, folder)
    write_tokenizer(folder, name=name)
    return model


def fields_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


KNOWN = {name for name in CONFIGS if name.partition("-")[0] in ("llama", "mistral", "qwen2", "qwen3")}
"""Those that llama.cpp computes as they are."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "llama-mha", "mistral", "qwen2", "qwen3"])
def test_transformers_alone_computes_the_same(family: str, tied: bool, tmp_path: Path) -> None:
    # It knows a head's size from the file for llama only; elsewhere it takes the one of the family.
    head_dim = {"qwen3": 128, "qwen2": 6}.get(family, 8)
    model = written(tmp_path / "source", family=family, tied=tied, head_dim=head_dim)
    if family == "mistral":
        model.config.sliding_window = None
        write_model(model, tmp_path / "source")
    made = export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f32", console=QUIET)
    assert made.gguf is not None
    assert made.gguf.rounding == 0
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf", dtype=torch.float32)
    assert opened.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits_of(opened.eval()), logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "family"), [("f16", "llama"), ("bf16", "qwen3"), *(("q8_0", family) for family in sorted(KNOWN))]
)
def test_every_family_and_kind_is_what_was_rounded(kind: str, family: str, tmp_path: Path) -> None:
    model = written(tmp_path / "source", family=family, hidden_size=96, head_dim=16)
    made = export(str(tmp_path / "source"), output=tmp_path / "out", gguf=kind, console=QUIET)
    assert made.gguf is not None
    assert 0 < made.gguf.rounding < {"f16": 1e-2, "bf16": 1e-1, "q8_0": 2e-1}[kind]
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / made.gguf.name).tensors}
    assert stored["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    assert stored["blk.1.ffn_up.weight"].tensor_type.name == kind.upper()
    # Rows of 40 are no whole number of blocks of 32.
    assert stored["blk.1.ffn_down.weight"].tensor_type.name == ("F16" if kind == "q8_0" else kind.upper())
    assert len(stored) == len(list(model.parameters())) + (family == "llama-rope-scaling")
    assert bool(made.gguf.limits) == (family in ("mistral", "qwen2-sliding"))


@pytest.mark.parametrize("family", sorted(CONFIGS.keys() - KNOWN))
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    written(tmp_path / "source", family=family)
    with pytest.raises(ShearingError, match="llama, mistral, qwen2, qwen3"):
        export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f16", console=QUIET)
    assert not (tmp_path / "out").exists()


def test_the_header_says_what_the_config_says(tmp_path: Path) -> None:
    written(tmp_path / "source", family="mistral")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    export(str(tmp_path / "source"), output=tmp_path / "out", gguf="bf16", console=QUIET)
    fields = fields_of(tmp_path / "out" / "model-bf16.gguf")
    expected = {
        "general.architecture": "llama",
        "general.file_type": 32,
        "llama.context_length": 4,  # the window: llama.cpp has none in this architecture
        "llama.embedding_length": 36,
        "llama.block_count": 4,
        "llama.feed_forward_length": 40,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 3,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10_000.0,
        "llama.vocab_size": ROWS,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: fields[key] for key in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "</s>"
    kinds = {token: gguf.TokenType(kind).name for token, kind in zip(tokens, types, strict=True)}
    assert kinds["<|im_start|>"] == "CONTROL"
    assert kinds["<think>"] == "USER_DEFINED"
    assert kinds[f"[PAD{ROWS - 1}]"] == "UNUSED"


def test_scaled_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    model = written(tmp_path / "source", family="llama-rope-scaling")
    export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f32", console=QUIET)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "model-f32.gguf").tensors}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    config: Any = model.config
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(torch.tensor(stored["rope_freqs.weight"].data), plain / scaled)


def test_other_scalings_are_named(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    written(tmp_path / "source", family="qwen3", rope_parameters=yarn)
    export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f32", console=QUIET)
    fields = fields_of(tmp_path / "out" / "model-f32.gguf")
    names = ("type", "factor", "original_context_length")
    assert [fields[f"qwen3.rope.scaling.{name}"] for name in names] == ["yarn", 4.0, 16]


@pytest.mark.parametrize("bos", [False, True])
# transformers has no rule for `smollm`; llama.cpp itself is asked in test_llama_cpp.py.
@pytest.mark.parametrize("name", [*(name for name in BYTE_LEVEL if name != "smollm"), "llama"])
def test_transformers_reads_the_same_tokens(name: str, bos: bool, tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, name=name, bos=bos)
    writer = gguf.GGUFWriter(tmp_path / "tokens.gguf", "llama")
    gguf_file.write_vocabulary(vocabulary_of(tmp_path, rows=ROWS), folder=tmp_path, writer=writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tokens.gguf")
    for text in [*TEXTS, *(f"{text}<|im_start|>" for text in TEXTS), "<think>a</s>"]:
        assert opened(text)["input_ids"] == tokenizer.encode(text).ids, text
    assert vocabulary_of(tmp_path, rows=ROWS).adds == {"bos": bos, "eos": False}


def _change(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    model = changes.pop("model", {})
    path.write_text(json.dumps({**content, **changes, "model": {**content["model"], **model}}))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama-bpe", {"model": {"ignore_merges": False}}, "ignore_merges False"),
        ("gpt-2", {"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ("gpt-2", {"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ("gpt-2", {"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ("llama", {"normalizer": None}, "spaces written as"),
        ("llama", {"model": {"merges": []}}, "no merge of"),
    ],
)
def test_a_tokenizer_that_llama_cpp_cannot_have_is_refused(
    name: str, changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, name=name)
    _change(tmp_path, **changes)
    with pytest.raises(ShearingError, match=said):
        vocabulary_of(tmp_path, rows=ROWS)


def test_what_has_no_place_is_refused(tmp_path: Path, tiny_inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, said: str, *, kind: str = "f16") -> None:
        with pytest.raises(ShearingError, match=said):
            export(str(source), output=tmp_path / "out", gguf=kind, console=QUIET)
        assert not (tmp_path / "out").exists()

    refused(tiny_inputs / "model", "WordLevel")
    refused(tiny_inputs / "model", "--gguf = 'q4_0'", kind="q4_0")
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    written(tmp_path / "dynamic", rope_parameters=dynamic)
    refused(tmp_path / "dynamic", "rope of one kind")
    written(tmp_path / "narrow", family="qwen2")
    refused(tmp_path / "narrow", "6 query heads of 8, 48 together")
    with torch.no_grad():
        model = tiny_model(vocab_size=ROWS)
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    write_model(model, tmp_path / "large")
    write_tokenizer(tmp_path / "large", name="gpt-2")
    refused(tmp_path / "large", r"1e\+06 in blk\.0\.ffn_up")
    with pytest.raises(ShearingError, match="at most 300"):
        vocabulary_of(tmp_path / "large", rows=300)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(tmp_path / "large", r"pip install 'shearing\[gguf\]'")


def test_the_command_names_the_file(tmp_path: Path) -> None:
    written(tmp_path / "source")
    arguments = ["export", str(tmp_path / "source"), "-o", str(tmp_path / "out"), "--gguf", "q8_0"]
    said = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert said.exit_code == 0, said.output
    assert "model-q8_0.gguf, opened with transformers too: rounding moves logits by" in said.stdout
    assert (tmp_path / "out" / "model-q8_0.gguf").is_file()


def test_a_config_without_a_head_size_of_its_own(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=ROWS, **sizes))
    write_model(model, tmp_path / "source")
    write_tokenizer(tmp_path / "source", name="gpt-2")
    export(str(tmp_path / "source"), output=tmp_path / "out", gguf="f32", console=QUIET)
    assert fields_of(tmp_path / "out" / "model-f32.gguf")["llama.attention.key_length"] == 8
