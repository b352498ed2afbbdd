"""What the site has besides the pages in docs/: the root's documents, files that are linked to, every public name.

Called by mkdocs, see `mkdocs.yml`. Names are read from the source text, so nothing of the project is imported.
"""

from __future__ import annotations

import ast
import os
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCUMENTS = {name: f"project/{name.lower()}" for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
"""Document of the root -> its page."""

FOLDERS = {"recipes": "recipes.md"}
"""Folder that documents link to -> the page about it."""

NOT_FOR_USERS = {"shearing.cli", "shearing.files", "shearing.processes", "shearing.settings"}

_LINK = re.compile(r"\]\((?!\w+:)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages and files."""
    for name, page in DOCUMENTS.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    for package, names in _packages():
        entries = "\n\n".join(f"::: {package}.{name}" for name in names)
        files.append(File.generated(config, f"api/{package}.md", content=f"# {package}\n\n{entries}\n"))
    for path in _linked_files():
        files.append(File.generated(config, f"files/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that lead out of docs/ lead to where the site has it."""
    here = page.file.src_uri
    origin = ROOT if here in DOCUMENTS.values() else ROOT / "docs"

    def rewritten(link: re.Match[str]) -> str:
        there = _place(origin, link[1])
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{link[2] or ''})"

    return markdown if here.startswith("api/") else _LINK.sub(rewritten, markdown)


def _place(origin: Path, target: str) -> str:
    """Where in the site is what a document in the folder `origin` links to."""
    path = Path(os.path.normpath(origin / target)).relative_to(ROOT).as_posix()
    inside = path.removeprefix("docs/")
    return DOCUMENTS.get(path) or FOLDERS.get(path) or (inside if inside != path else f"files/{path}")


def _linked_files() -> Iterator[str]:
    found = set()
    for origin, documents in (
        (ROOT, [ROOT / name for name in DOCUMENTS]),
        (ROOT / "docs", (ROOT / "docs").glob("*.md")),
    ):
        for document in documents:
            for target, _ in _LINK.findall(document.read_text(encoding="utf-8")):
                found.add(_place(origin, target))
    yield from sorted(place.removeprefix("files/") for place in found if place.startswith("files/"))


def _packages() -> Iterator[tuple[str, list[str]]]:
    """Packages with their public names, as `__all__` has them."""
    for file in sorted((ROOT / "shearing").rglob("__init__.py")):
        package = ".".join(file.parent.relative_to(ROOT).parts)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names = ast.literal_eval(node.value)
                if package not in NOT_FOR_USERS and _is_outer(package):
                    yield package, names


def _is_outer(package: str) -> bool:
    """Whether people import from it: a package on a floor, or of one that has nothing but packages."""
    inner = package.count(".")
    return inner < 2 or (package.startswith(("shearing.pruning.", "shearing.integrations.")) and inner == 2)
