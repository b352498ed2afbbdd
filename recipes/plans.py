"""What `shear plan` says, in documents: `python recipes/plans.py docs/plan.md …` writes anew what commands put out.

Sizes of the sources are in `sources/`, so no model is fetched.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from shearing.cli import app

RECIPES = Path(__file__).parent
SOURCES = {
    "recipes/sheared-llama-1.3b.yaml": RECIPES / "sources" / "llama-2-7b",
    "model.source=meta-llama/Llama-2-70b-hf": RECIPES / "sources" / "llama-2-70b",
}
"""Words of a command -> folder with the config of the source that they mean; the last one counts."""

COLUMNS = 110

_SHOWN = re.compile(r"```console\n\$ shear (plan .*)\n[^`]*```")


def output(command: str) -> str:
    """What a command, `plan …`, prints."""
    words = command.split()
    # The recipe is named as from the folder of the repository, from wherever this runs.
    arguments = [str(RECIPES.parent / word) if word.startswith("recipes/") else word for word in words]
    folder = [folder for word, folder in SOURCES.items() if word in words][-1]
    result = CliRunner().invoke(app, [*arguments, f"model.source={folder}"], env={"COLUMNS": str(COLUMNS)})
    assert result.exit_code == 0, result.output
    return "\n".join(line.rstrip() for line in result.output.rstrip().splitlines())


def embedded(document: str) -> str:
    """A document with what its commands print today."""
    return _SHOWN.sub(lambda found: f"```console\n$ shear {found[1]}\n{output(found[1])}\n```", document)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(embedded(file.read_text(encoding="utf-8")), encoding="utf-8")
