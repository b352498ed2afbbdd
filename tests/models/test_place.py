"""A source that is not there is said at once, whether it is meant as a folder or as a name on the hub."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shearing.errors import ShearingError
from shearing.models import place
from shearing.models.loading import load_config
from shearing.models.place import folder_here, require_place
from shearing.models.tokenizer import load_tokenizer


@pytest.fixture(autouse=True)
def _anew() -> None:
    place._ask_hub.cache_clear()


def test_a_folder_is_one(tmp_path: Path) -> None:
    require_place(str(tmp_path))


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "~/model", "a/b/c", "runs/nothing", "model/"])
def test_what_can_only_be_a_path_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(place, "_ask_hub", None)
    for opened in (require_place, load_config, load_tokenizer):
        with pytest.raises(ShearingError, match="there is no such folder") as raised:
            opened(name)
        assert raised.value.field == "source"


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ShearingError, match="is a file"):
        require_place(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("name", ["owner/name", "name"])
def test_a_hub_that_cannot_be_reached_is_said_once_and_fast(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub import HfApi

    asked = []

    def lost(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "model_info", lost)
    began = time.monotonic()
    with pytest.raises(ShearingError, match=r"there is no folder .* here; .*\(Name or service not known\)"):
        load_config(name)
    assert time.monotonic() - began < 5
    assert asked == [name]
    assert not capfd.readouterr().err


def test_a_name_that_is_here_already_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "folder_here", lambda *_, **__: tmp_path)
    monkeypatch.setattr(place, "_ask_hub", None)
    require_place("owner/name")


def test_what_is_here_of_a_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert folder_here("owner/name") is None
    assert folder_here("no name at all") is None
    commit = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    assert folder_here("owner/name") is None
    (commit / "config.json").write_text("{}")
    assert folder_here("owner/name") == commit
