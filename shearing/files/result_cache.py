"""Results about a model that are worth keeping: one JSON file each, under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json

VARIABLE = "SHEARING_CACHE"


def cache_folder() -> Path:
    """Folder of the cache: `$SHEARING_CACHE`, or `shearing` in `$XDG_CACHE_HOME`, which is `~/.cache` where unset.

    Raises:
        ShearingError: no variable says where, and there is no home directory.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # which is ignored by the XDG specification
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise ShearingError(
                f"{VARIABLE} (environment)",
                value=None,
                allowed="a folder for results that are kept, as there is no home directory",
                mend=f"set {VARIABLE} to a folder",
            ) from error
    return base / "shearing"


@dataclass(frozen=True)
class Cached:
    """The place of one result.

    Attributes:
        path: its file.
        key: everything that it depends on, JSON-able.
    """

    path: Path
    key: Mapping[str, Any]

    @classmethod
    def of(cls, kind: str, *, key: Mapping[str, Any]) -> Cached:
        """The place of the result of this kind and key."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return cls(cache_folder() / kind / f"{digest}.json", key)

    def read(self) -> Any:
        """The result; None where there is none, or a file that is damaged."""
        try:
            content = read_json(self.path)
        except (OSError, ShearingError):
            return None
        return content.get("result") if content.get("key") == json.loads(json.dumps(self.key)) else None

    def write(self, result: Any) -> None:
        """Keep a result, whole or not at all.

        Raises:
            OSError: the folder cannot be written to.
        """
        write_json(self.path, {"key": dict(self.key), "result": result})
