"""Files beside a model's weights: which of them go with a result."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shearing.models.stored.companions import FILES, companions, copy_companions, folder_of

GO = {
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "vocab.json",
    "merges.txt",
    "qwen.tiktoken",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "README.md",
    "LICENSE",
    "license.txt",
    "LICENCE.md",
    "NOTICE",
    "USE_POLICY.md",
}
STAY = {
    "config.json",
    "params.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "sparsity.json",
    "shape.json",
    "evaluation.json",
    "experts.json",
    "original/params.json",
    "onnx/config.json",
    "events.out",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in GO | STAY:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(9))
    return tmp_path / "source"


def test_what_goes_with_a_result(folder: Path, tmp_path: Path) -> None:
    assert set(companions(folder)) == GO
    (tmp_path / "result").mkdir()
    copy_companions(folder, to=tmp_path / "result")
    copied = {path for path in (tmp_path / "result").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "result").as_posix() for path in copied} == GO
    assert all(path.read_bytes() == (folder / path.relative_to(tmp_path / "result")).read_bytes() for path in copied)


def test_a_name_on_the_hub_is_downloaded_with_all_of_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folder_of("org/name", revision="v1", also=["masks.*"]) == tmp_path
    assert asked == {"name": "org/name", "revision": "v1", "patterns": [*FILES, "masks.*"]}
    got = set(filter_repo_objects(sorted(GO | STAY), allow_patterns=list(FILES)))
    assert got >= GO | {"config.json", "model.safetensors.index.json"}
    assert not got & {"model.safetensors", "pytorch_model.bin"}
