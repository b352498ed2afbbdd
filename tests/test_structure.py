"""The house keeps its shape: floors, no circles, what reads without torch, public names, the size of folders.

Read from the source text alone, but for what must import without torch, public names and keys of recipes.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from shearing.runs.recipe import Recipe
from shearing.settings.document import keys
from tests.repository import ROOT

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "late", "progress"),
    ("settings", "files", "processes"),
    ("models", "data"),
    ("objectives",),
    ("evaluation", "training"),
    ("pruning",),
    ("runs", "integrations"),
    ("data_tools",),
    ("cli",),
)
"""From the ground up. A package imports only floors below its own; those of one floor do not know each other."""

WITHOUT_TORCH = (
    "shearing",
    "shearing.cli",
    "shearing.errors",
    "shearing.files.durable",
    "shearing.processes.launcher",
    "shearing.progress",
    "shearing.runs.recipe",
    "shearing.runs.run_directory",
    "shearing.settings.document",
    "data_tools.preparation.recipe",
)
NEEDS = {"shearing.integrations.composer": "composer"}
"""Package -> what has to be installed for its names to be there; `make test-composer` has it."""
MOST_ROOMS = 13
WITHOUT_MIRROR = {"distributed"}
"""Folders of tests that are of no folder of the library: several processes at once."""


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of the library and data_tools."""
    files = (file for top in ("shearing", "data_tools") for file in (ROOT / top).rglob("*.py"))
    return {_name_of(file): file for file in files}


def _name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> modules of this project that it imports at any place: at the top, late, or for types alone."""
    return {name: frozenset(_imported(ast.parse(file.read_text(encoding="utf-8")))) for name, file in modules().items()}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if found := inner if inner in modules() else node.module:
                    yield from {found} & modules().keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules().keys()


def package_of(module: str) -> str:
    """The package on a floor that a module belongs to."""
    first, *rest = module.split(".")
    return rest[0] if first == "shearing" and rest else first


def test_every_package_has_a_floor() -> None:
    floors = [package for floor in FLOORS for package in floor]
    assert len(floors) == len(set(floors))
    assert {package_of(name) for name in modules()} <= {*floors, "shearing", "__main__"}


def test_every_arrow_points_down() -> None:
    floor = {package: number for number, packages in enumerate(FLOORS) for package in packages}
    upward = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if package_of(module) in floor
        and package_of(other) in floor
        and package_of(module) != package_of(other)
        and floor[package_of(module)] <= floor[package_of(other)]
    ]
    assert not upward


@pytest.mark.parametrize(
    ("package", "below"),
    [
        # What looks at text knows no way to prune, and the two ways do not know each other.
        ("shearing.pruning.calibration", "shearing.pruning."),
        ("shearing.pruning.structured", "shearing.pruning.sparse"),
        ("shearing.pruning.sparse", "shearing.pruning.structured"),
        ("shearing.data.corpus", "shearing.data.mixture"),
        ("shearing.runs.planning", "shearing.runs.stages"),
        ("shearing.runs.report", "shearing.runs.stages"),
        ("data_tools.preparation", "data_tools.demo"),
        ("data_tools.adoption", "data_tools.preparation"),
    ],
)
def test_neighbours_that_do_not_know_each_other(package: str, below: str) -> None:
    inside = [name for name in modules() if f"{name}.".startswith(f"{package}.")]
    assert inside
    wrong = [
        f"{name} imports {other}"
        for name in inside
        for other in imports()[name]
        if other.startswith(below) and not f"{other}.".startswith(f"{package}.")
    ]
    assert not wrong


def test_there_are_no_circles() -> None:
    left = {name: set(others) - {name} for name, others in imports().items()}
    while bottom := {name for name, others in left.items() if not others}:
        left = {name: others - bottom for name, others in left.items() if name not in bottom}
    assert not left, "in a circle, or above one"


def test_only_the_command_line_imports_data_tools() -> None:
    importers = {
        package_of(module)
        for module, others in imports().items()
        if any(package_of(other) == "data_tools" for other in others)
    }
    assert importers <= {"cli", "data_tools"}


def test_these_import_where_there_is_no_torch() -> None:
    script = (
        "import importlib, sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers'):\n"
        "            raise ModuleNotFoundError(f'no {name} here')\n"
        "sys.meta_path.insert(0, Without())\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
    )
    recipes = [name for name in modules() if name.endswith(".recipe")]
    subprocess.run([sys.executable, "-c", script, *WITHOUT_TORCH, *recipes], cwd=ROOT, check=True)


def faces() -> list[str]:
    """Packages that say which of their names are public."""
    return sorted(name for name, file in modules().items() if file.name == "__init__.py" and _public(name) is not None)


def _public(package: str) -> list[str] | None:
    for node in ast.parse(modules()[package].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            names = ast.literal_eval(node.value)
            assert isinstance(names, list)
            return names
    return None


def test_every_package_shows_its_public_names() -> None:
    inner = {f"shearing.pruning.{name}" for name in ("calibration", "sparse", "structured")}
    outer = {f"shearing.{package}" for floor in FLOORS for package in floor} & modules().keys()
    packages = {name for name in outer if modules()[name].name == "__init__.py"} | inner
    assert packages - set(faces()) <= {"shearing.pruning", "shearing.integrations"}


@pytest.mark.parametrize("package", faces())
def test_public_names_are_there(package: str) -> None:
    if package in NEEDS:
        pytest.importorskip(NEEDS[package])
    module = importlib.import_module(package)
    names = _public(package)
    assert names
    assert len(names) == len(set(names))
    for name in names:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name


@pytest.mark.parametrize("package", faces())
def test_types_are_told_of_every_name_that_comes_late(package: str) -> None:
    tree = ast.parse(modules()[package].read_text(encoding="utf-8"))
    homes = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "late"]
    if not homes:
        return
    told = {
        alias.name: f"{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{package}.")
        for alias in node.names
    }
    come_late = {name: f"{package}.{home}" for name, home in ast.literal_eval(homes[0].args[1]).items()}
    told_late = {name: home for name, home in told.items() if name in come_late}
    assert told_late == come_late


@pytest.mark.parametrize("package", faces())
def test_no_module_has_the_name_of_a_public_one(package: str) -> None:
    """Else importing the module would replace the name."""
    if package in NEEDS:
        pytest.importorskip(NEEDS[package])
    inside = {name.removeprefix(f"{package}.") for name in modules() if name.startswith(f"{package}.")}
    public = _public(package)
    assert public is not None
    own = {name for name in public if not isinstance(getattr(importlib.import_module(package), name), type(ast))}
    assert not own & inside


def test_no_folder_has_too_many_rooms() -> None:
    rooms: Counter[Path] = Counter()
    for file in modules().values():
        if file.name == "__init__.py":
            rooms[file.parent.parent] += 1
        else:
            rooms[file.parent] += 1
    full = {str(folder.relative_to(ROOT)): count for folder, count in rooms.items() if count > MOST_ROOMS}
    assert full.keys() <= {"shearing"}, full


def test_every_folder_has_an_init() -> None:
    without = [
        str(folder.relative_to(ROOT))
        for top in ("shearing", "data_tools", "tests")
        for folder in {file.parent for file in (ROOT / top).rglob("*.py")}
        if not (folder / "__init__.py").exists()
    ]
    assert not without


def test_tests_mirror_folders() -> None:
    ours = {file.parent.relative_to(ROOT / "shearing") for file in (ROOT / "shearing").rglob("*.py")}
    ours |= {file.parent.relative_to(ROOT) for file in (ROOT / "data_tools").rglob("*.py")}
    tests = {file.parent.relative_to(ROOT / "tests") for file in (ROOT / "tests").rglob("test_*.py")}
    assert {str(folder) for folder in tests - ours} == WITHOUT_MIRROR


def test_integrations_take_public_names_alone() -> None:
    """They are what people may write themselves."""
    inside = {name: file for name, file in modules().items() if package_of(name) == "integrations"}
    examples = {str(file): file for file in (ROOT / "examples").glob("*.py")}
    assert inside
    assert examples
    for name, file in {**inside, **examples}.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or f"{node.module}".partition(".")[0] != "shearing":
                continue
            beside = f"{node.module}".startswith(f"{name.rpartition('.')[0]}.") or file.name == "__init__.py"
            if not beside and node.module != "shearing.late":
                names = {alias.name for alias in node.names}
                assert names <= set(_public(f"{node.module}") or ()), f"{name}: {ast.unparse(node)}"


def test_private_names_stay_in_their_module() -> None:
    taken: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in modules():
                taken[name] += [alias.name for alias in node.names if alias.name.startswith("_")]
    assert not {name: names for name, names in taken.items() if names}


SAYS_A_KEY = {
    # What a dotted key looks like: overrides are read without knowing of which recipe.
    ("shearing.settings.reading", "prune.learning_rate"),
}
"""Modules below `runs` that may say a key of a run, with a reason each."""


def _said(node: ast.AST) -> Iterator[str]:
    """The texts below a node, with {} for what is filled in.

    Without docstrings, which may tell programmers what a run does with a component; without `description=` of keys,
    which are read in the reference of the whole recipe; without the modules that a face names (`late`).
    """
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.keyword) and node.arg == "description":
        return
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "late":
        return
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        filled_in = [part.value for part in node.values if isinstance(part, ast.FormattedValue)]
        for value in filled_in:
            yield from _said(value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _said(child)


def keys_of_a_run_in(node: ast.AST) -> set[str]:
    """Dotted keys of the root recipe that stand in the texts below a node, whole or made of a section and a name."""
    dotted = [name for name, _ in keys(Recipe) if "." in name]
    sections = {name.rpartition(".")[0] for name in dotted}
    names = sorted([*dotted, *sections - set(Recipe.model_fields), *(f"{section}.{{}}" for section in sections)])
    key = re.compile(rf"(?<![\w./])(?:run_dir|{'|'.join(map(re.escape, reversed(names)))})(?![\w/]|\.\w)")
    return {found for text in _said(node) for found in key.findall(text)}


def test_components_do_not_say_keys_of_a_run() -> None:
    """They raise in their own words, and `shearing.runs.names` says what people call that."""
    above = FLOORS.index(("runs", "integrations"))
    below = {package for floor in FLOORS[:above] for package in floor}
    found = {
        (name, key)
        for name, file in modules().items()
        if package_of(name) in below
        for key in keys_of_a_run_in(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert found == SAYS_A_KEY


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 'training.device'", {"training.device"}),
        (
            "f'set training.deepspeed.zero_stage={3}, or {x} mixture.floor'",
            {"training.deepspeed.zero_stage", "mixture.floor"},
        ),
        ("f'target.{name}'", {"target.{}"}),
        ("f\"{', '.join('pretrain.lora' for _ in x)}\"", {"pretrain.lora"}),
        ("raise Error('a new run_dir')", {"run_dir"}),
        ("def f():\n    'of `training.device`'", set()),
        ("Field(description='unset: data.corpus')", set()),
        ("late(__name__, {'a': 'mixture.reference'})", set()),
        ("'model.layers', 'evaluation.json', 'data.corpus.format', 'some/data.corpus'", set()),
    ],
)
def test_keys_of_a_run_are_found(source: str, found: set[str]) -> None:
    assert keys_of_a_run_in(ast.parse(source)) == found


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def python_of(document: Path) -> list[str]:
    """Python that people may copy from a document."""
    return re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if python_of(path)], ids=lambda path: path.stem)
def test_documents_show_public_names(document: Path) -> None:
    for block in python_of(document):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and package_of(f"{node.module}") in {*sum(FLOORS, ()), "shearing"}:
                names = {alias.name for alias in node.names}
                assert names <= set(_public(f"{node.module}") or ()), f"{node.module} does not show {names}"


def test_modules_that_documents_name_are_there() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for path in re.findall(r"\b(?:shearing|data_tools|tests|benchmarks)/[a-z0-9_/]+\.py\b", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_benchmarks_import_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}".partition(".")[0] in ("shearing", "data_tools"):
            module = importlib.import_module(f"{node.module}")
            for alias in node.names:
                assert f"{node.module}.{alias.name}" in modules() or hasattr(module, alias.name), ast.unparse(node)


def test_modules_that_strings_name_are_there() -> None:
    """Preloaded modules, late homes and patched places are strings, which no linter follows."""
    files = [*modules().values(), *(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            if re.fullmatch(r"(?:shearing|data_tools)(?:\.[a-z_]\w*)+(?:[.:]\w+)?", node.value):
                name = node.value.replace(":", ".")
                while name and name not in modules():
                    name = name.rpartition(".")[0]
                left = node.value.replace(":", ".").removeprefix(name).removeprefix(".")
                assert not left or hasattr(importlib.import_module(name), left), f"{file.name}: {node.value}"
