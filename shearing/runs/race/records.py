"""What is kept of a race: one small file for each row, under a fingerprint of all that its figures depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shearing.errors import ShearingError
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import read_json, write_json
from shearing.models.stored.spellings import in_both_spellings
from shearing.models.stored.stored_model import NOT_THE_MODEL
from shearing.runs.race.rows import Row
from shearing.runs.recipe import Recipe
from shearing.settings.document import section_of
from shearing.settings.neutral import is_neutral, neutral_keys

Record = dict[str, Any]
"""The content of a row's file."""

PLACES = ("model.source", "model.revision", "data.corpus")
"""Keys that say where something is: what is there is fingerprinted instead."""

OF_JUDGING = ("evaluation.tokens_per_domain",)
"""Keys that are neutral to a run, and decide what a race measures."""


@dataclass(frozen=True, kw_only=True)
class RaceFolder:
    """Where everything of a race is.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """What all rows have in common (JSON)."""
        return self.path / "race.json"

    @property
    def results(self) -> Path:
        """The tables, as values (JSON)."""
        return self.path / "results.json"

    @property
    def tables(self) -> Path:
        """The tables (markdown)."""
        return self.path / "results.md"

    @property
    def picture(self) -> Path:
        """Loss of every contender (SVG)."""
        return self.path / "results.svg"

    def row(self, row: Row) -> Path:
        """File of a finished row (JSON)."""
        return self.path / "rows" / f"{row.name}.json"

    def scores(self, metric: str, *, seed: int) -> Path:
        """Scores of a metric, measured once and shared by rows."""
        return self.path / "scores" / f"{metric}-seed{seed}.safetensors"

    def cut(self, row: Row) -> Path:
        """Folder of the model that a row starts from, shared by rows of other lengths while they need it."""
        return self.path / "cuts" / row.cut_name

    def run(self, row: Row) -> Path:
        """Folder of a row's run, while it runs."""
        return self.path / "work" / row.name

    def model(self, row: Row) -> Path:
        """Folder of a row's final model, if it is kept."""
        return self.path / "models" / row.name


def model_fingerprint(source: str, *, revision: str | None) -> str:
    """Hash of a model's config and weights, wherever it lies; of a name on the hub, the name and the revision.

    The same whatever release of transformers wrote the config, and under whichever names: a race outlasts an update.
    """
    folder = Path(source)
    if not folder.is_dir():
        return f"{source}@{revision or 'main'}"
    config = in_both_spellings(read_json(folder / "config.json"))
    said = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
    return _digest([said, *([file.name, sha256_of_file(file)] for file in sorted(folder.glob("*.safetensors")))])


def settings_of(
    recipe: Recipe, *, model: str, corpus: str, outside: str | None, split: str, precision: str
) -> dict[str, Any]:
    """What the figures of rows by this recipe depend on, by dotted keys; no place and nothing of the machine.

    A key at its default is left out, so that a race goes on with a release that has more keys.

    Args:
        recipe: of a race or of one of its rows.
        model, corpus, outside: fingerprints; outside: None where no other text judges.
        split: of the corpus, that judges.
        precision: of matrix products.
    """
    neutral = neutral_keys(Recipe)
    kept = {
        key: value
        for key, value in _given(recipe)
        if key in OF_JUDGING or not (key in PLACES or is_neutral(key, among=neutral))
    }
    return {**kept, "model": model, "corpus": corpus, "outside": outside, "split": split, "precision": precision}


def _given(section: BaseModel, *, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The keys that are not at their defaults; of a section that may be absent, that it is there."""
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel) and section_of(field):
            if field.default is None:
                yield f"{prefix}{name}", "given"
            yield from _given(value, prefix=f"{prefix}{name}.")
        elif value != field.get_default(call_default_factory=True):
            yield f"{prefix}{name}", plain[name]


def fingerprint(row: Row, *, settings: Mapping[str, Any]) -> str:
    """Of a row: of its method and its settings."""
    return _digest({"row": row.name, "settings": settings})


def read_record(path: Path, *, expected: str) -> Record | None:
    """A finished row; None where there is none, or one of other settings.

    Args:
        path: its file.
        expected: its fingerprint.

    Raises:
        ShearingError: a damaged file.
    """
    if not path.is_file():
        return None
    record = read_json(path)
    return record if record.get("fingerprint") == expected else None


def require_same_race(folder: RaceFolder, *, settings: Mapping[str, Any]) -> None:
    """Check that a folder holds no race of other settings, and say there of which it is from now on.

    Raises:
        ShearingError: it holds another race.
    """
    now = json.loads(json.dumps(settings))
    if folder.settings.is_file():
        earlier = read_json(folder.settings)
        changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
        if changed:
            raise ShearingError(
                "--output",
                value=str(folder.path),
                allowed="a folder without a race, or with one of this recipe; what differs from its race.json: "
                + "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in changed),
                mend="choose another --output, or take those values back to continue that race",
            )
        return
    write_json(folder.settings, dict(now))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
