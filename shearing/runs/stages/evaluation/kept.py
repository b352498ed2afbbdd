"""What was found out about a model of a run, kept in its folder as long as all that it depends on is equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from shearing.files.result_cache import Cached
from shearing.runs.run_directory import RunDirectory

FOLDER = "judged"


def kept(run: RunDirectory, *, kind: str, key: Mapping[str, Any]) -> Cached:
    """The place of a result in the run's folder.

    Args:
        run: of the model.
        kind: what was found out.
        key: everything that it depends on, JSON-able.
    """
    digest = hashlib.sha256(json.dumps({"kind": kind, **key}, sort_keys=True).encode()).hexdigest()[:16]
    return Cached(run.path / FOLDER / f"{kind}-{digest}.json", {"kind": kind, **key})
