"""allocation.json: the level of every matrix, why, and of which model; what any later run can use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from shearing.errors import ShearingError
from shearing.files.durable import read_json, write_json
from shearing.models.stored.stored_model import Source
from shearing.pruning.calibration.places import Matrix
from shearing.pruning.sparse.allocation.allocator import mean_density
from shearing.pruning.sparse.allocation.facts import ALLOCATIONS
from shearing.pruning.sparse.patterns import Pattern, pattern_of

FORMAT = 1
FILE_NAME = "allocation.json"


@dataclass(frozen=True)
class StoredAllocation:
    """An allocation as its file has it.

    Attributes:
        patterns: by name of each matrix.
        content: the whole file, JSON-able.
    """

    patterns: Mapping[str, Pattern]
    content: Mapping[str, Any]

    @property
    def budget(self) -> Fraction:
        """Share of the weights that is kept."""
        return Fraction(self.content["budget"]["reached"]["kept"])

    @property
    def fingerprint(self) -> str:
        """Hash of model and patterns (hexadecimal, 32 digits): the same for the same levels, however found."""
        said = [self.content["model_fingerprint"], self.content["patterns"]]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]


def write_allocation(
    path: Path,
    *,
    patterns: Mapping[str, Pattern],
    matrices: list[Matrix],
    source: Source,
    asked: Fraction,
    method: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> StoredAllocation:
    """Write an allocation, atomically.

    Args:
        path: of the file; its folder exists.
        patterns: by name of each matrix.
        matrices: what is pruned.
        source: the dense model.
        asked: share of the weights to keep that was asked for.
        method: JSON-able; how it was found.
        facts: JSON-able; what it rests on.
    """
    reached = mean_density(patterns, matrices=matrices)
    content = {
        "format": FORMAT,
        **method,
        "budget": {
            "asked": {"kept": str(asked), "sparsity": float(1 - asked)},
            "reached": {"kept": str(reached), "sparsity": float(1 - reached)},
        },
        "model": str(source.folder),
        "model_fingerprint": source.fingerprint,
        "patterns": {name: str(pattern) for name, pattern in patterns.items()},
        "facts": dict(facts),
    }
    write_json(path, content)
    return StoredAllocation(dict(patterns), content)


def read_allocation(path: Path, *, source: Source | None) -> StoredAllocation:
    """Read an allocation for a model; None: whichever it is of.

    Raises:
        ShearingError: no such file, not one of ours, or the allocation of another model.
    """
    try:
        content = read_json(path)
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}")
        stored = StoredAllocation({name: pattern_of(text) for name, text in content["patterns"].items()}, content)
        of_model = content["model_fingerprint"]
        _ = stored.budget
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ShearingError(
            "allocation",
            value=f"{path} ({error.value if isinstance(error, ShearingError) else error})",
            allowed=f"{', '.join(ALLOCATIONS)}, or an {FILE_NAME} that `shear allocate` has written",
            mend="check the path, or run `shear allocate` again",
        ) from error
    if source is not None and of_model != source.fingerprint:
        raise ShearingError(
            "allocation",
            value=f"{path}, made for {content['model']}",
            allowed="an allocation of the model that is pruned: same config, same weights",
            mend=f"run `shear allocate` on {source.folder}",
        )
    return stored
