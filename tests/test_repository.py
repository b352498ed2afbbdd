"""What the repository says about itself is true: recipes load, README commands run, versions and documents agree."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from transformers import Olmo3Config
from typer.testing import CliRunner

import shearing
from data_tools.preparation.recipe import PreparationRecipe
from shearing.cli.frame import app
from shearing.data.corpus.corpus import Corpus
from shearing.models.families import FAMILIES
from shearing.pruning.sparse.recipe import SparsifyRecipe
from shearing.runs.recipe import Recipe, load_recipe
from shearing.runs.run_directory import RunDirectory
from shearing.settings.document import embed_reference
from tests.repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked_files() -> list[Path]:
    """Files under version control, or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_and_resolves_to_itself(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_key_of_a_recipe_has_a_comment(path: Path) -> None:
    lines = path.read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        is_value = re.match(r" *[a-z_]+:\s+\S", line)
        assert not is_value or "  # " in line or above.strip().startswith("#"), line


def test_paper_recipes_have_the_papers_figures() -> None:
    for name, parameters in (("1.3b", 1_345_423_360), ("2.7b", 2_701_560_320)):
        recipe = load_recipe(ROOT / "recipes" / f"sheared-llama-{name}.yaml")
        sizes = recipe.target
        d, m, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
        assert d
        assert m
        assert layers
        assert sizes.num_attention_heads == d // 128
        assert layers * (4 * d * d + 3 * d * m + 2 * d) + d + 2 * 32_000 * d == parameters
        assert isinstance(recipe.mixture.initial_weights, dict)
        assert sum(recipe.mixture.initial_weights.values()) == pytest.approx(1.0)
        assert recipe.data.domains == list(recipe.mixture.initial_weights)


def test_constraints_pin_what_the_project_asks_for() -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert str(pin.specifier).startswith("=="), line
            assert "+" not in str(pin.specifier), f"a local build is not to be had elsewhere: {line}"
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    wanted = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in map(Requirement, itertools.chain(*wanted)):
        found = pins.get(canonicalize_name(requirement.name))
        assert found, f"{requirement.name} is not pinned"
        for pin in found:
            version = str(pin.specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_versions_agree() -> None:
    assert PROJECT["version"] == shearing.__version__
    assert (
        f"[{shearing.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
        or "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_public_names_exist() -> None:
    for name in shearing.__all__:
        assert getattr(shearing, name).__doc__
    with pytest.raises(AttributeError):
        _ = shearing.absent


def test_recipe_documentation_is_current() -> None:
    for name, model in (("recipe", Recipe), ("sparsity", SparsifyRecipe)):
        document = (ROOT / "docs" / f"{name}.md").read_text()
        assert embed_reference(document, model=model) == document, "run `make docs`"
    document = (ROOT / "docs" / "data.md").read_text()
    assert embed_reference(document, model=PreparationRecipe, heading="###") == document, "run `make docs`"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [command for block in blocks for command in block.splitlines() if command]


@pytest.mark.parametrize("command", [each for each in readme_commands() if each.startswith("shear ")])
def test_commands_of_the_readme(
    command: str, tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, *arguments = shlex.split(command, comments=True)
    if arguments[:2] in (["data", "inspect"], ["data", "verify"]):
        shutil.copytree(tiny_inputs / "corpus", tmp_path / "my" / "corpus")
        monkeypatch.chdir(tmp_path)
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return
    if arguments[0] == "data":
        monkeypatch.chdir(tmp_path)
        for name in ("books", "code"):
            (tmp_path / "my" / name).mkdir(parents=True)
            for i in range(9):
                (tmp_path / "my" / name / f"{i}.txt").write_text(f"abc {i}")
        (tmp_path / "my" / "model").symlink_to(tiny_inputs / "model")
        result = CliRunner().invoke(app, [*arguments, "--workers", "1"])
        assert result.exit_code == 0, result.output
        assert Corpus.open(tmp_path / "my" / "corpus").domains == ["books", "code"]
        return
    # The same command on a tiny model; only what exists after `make demo` is replaced.
    replaced = [
        f"model.source={tiny_inputs / 'model'}",
        f"data.corpus={tiny_inputs / 'corpus'}",
        *("target.hidden_size=16", "target.num_hidden_layers=2", "target.intermediate_size=24"),
        *("target.num_attention_heads=2", "target.num_key_value_heads=2", "data.sequence_length=16"),
        "mixture.heldout_tokens=32",
        "evaluation.outside=null",
        "evaluation.tasks=[]",
    ]
    if arguments[0] == "run":
        arguments = ["config", "check", *arguments[1:]]
    result = CliRunner().invoke(app, [*arguments, *replaced, f"run_dir={tmp_path}"])
    assert result.exit_code == 0, result.output


def test_python_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    seen: list[Recipe] = []

    def run(recipe: Recipe) -> RunDirectory:
        seen.append(recipe)
        return RunDirectory(recipe.run_dir)

    monkeypatch.setattr(shearing, "run", run, raising=False)
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    assert seen[0].run_dir == Path("runs/mine")


def test_python_of_extending() -> None:
    defined: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "extending.md", "exec"), defined)
    config = Olmo3Config()
    assert defined["OLMO3"].of(config) == FAMILIES["olmo3"].of(config)
    callback, again = defined["LowestLoss"](), defined["LowestLoss"]()
    for line in ({"loss": 3.0}, {"loss": 2.0}, {"event": "mixture"}, {"loss": 2.5}):
        callback.log(None, line)
    again.load_state_dict(callback.state_dict())
    assert again.lowest == 2.0


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [each.split()[1] for each in readme_commands() if each.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["run"],
        ["prune"],
        ["compact"],
        ["pretrain"],
        ["eval"],
        ["config", "check"],
        ["data", "prepare"],
        ["sparsify"],
    ],
)
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_hooks_run_what_make_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude")
        assert f"$(BIN)/{command}" in makefile


def test_nothing_is_left_unfinished() -> None:
    unfinished = re.compile("|".join(["NotImplemented" + "Error", r"\bTO" + "DO", r"\bFIX" + "ME", r"\bXX" + r"X\b"]))
    for path in tracked_files():
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".j2"} or path.name in {"Makefile", "run"}:
            found = unfinished.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path}: {found}"


def test_no_large_files() -> None:
    for path in tracked_files():
        assert path.stat().st_size < 1_000_000, f"{path} does not belong in the repository"


def test_the_site_leads_to_every_document() -> None:
    def pages(entry: Any) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        else:
            for below in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(below)

    nav = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert len(nav) == len(set(nav))
    documents = {page for page in nav if not page.startswith(("api/", "project/"))}
    assert documents == {path.name for path in (ROOT / "docs").glob("*.md")}
