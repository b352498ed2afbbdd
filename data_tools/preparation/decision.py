"""Where the documents of a preparation go, and whether that still holds.

It is decided beside the domains that are in the corpus by then, with whose texts none of its own may be in two splits.
Others may come before its own are in their places: after a kill, or while jobs of a cluster wait.

    places/NAME.npy      uint8 [documents] of `Place`, of one domain
    places/NAME.sha256   of the manifest of the domain that was made of it; written before the domain is published
    places/known.json    the domains that were there, with SHA-256 of their manifests
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.corpus_output import newcomers, publishing, require_no_newcomers
from data_tools.preparation.work_folder import publish
from shearing.data.corpus.domain_folder import Places, domains_of
from shearing.data.corpus.format import MANIFEST_NAME
from shearing.files.checksums import sha256_of_file
from shearing.files.durable import read_json, write_json, write_text

_KNOWN = "known.json"


@dataclass(frozen=True)
class Decision:
    """What is decided once for all domains of a preparation.

    Args:
        folder: of it; appears whole.
        output: folder of the corpus.
    """

    folder: Path
    output: Path

    def newcomers(self) -> list[str]:
        """Domains of the corpus that were not there, or not the same, and that it has not made."""
        return newcomers(self.output, known=self._known)

    def holds(self) -> bool:
        """Whether it was decided, and beside the domains that are there."""
        return self.folder.exists() and not self.newcomers()

    def require(self) -> None:
        """Check that it holds.

        Raises:
            ShearingError: other domains have come.
        """
        require_no_newcomers(self.output, known=self._known)

    def write(self, places: Mapping[str, Places], *, known: Mapping[str, str]) -> None:
        """Decide, in place of what was decided before.

        Args:
            places: of the documents of each domain.
            known: the domains that they were chosen beside; see `corpus_output.standing`.
        """
        partial = self.folder.with_name(f".{self.folder.name}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)  # of a process of this number that was killed
        partial.mkdir()
        for name, each in places.items():
            _save(partial / f"{name}.npy", each)
        write_json(partial / _KNOWN, {"domains": dict(known)})
        shutil.rmtree(self.folder, ignore_errors=True)
        publish(partial, self.folder)

    def places(self, name: str) -> Places:
        """Of the documents of a domain; uint8 [documents] of `Place`."""
        places: Places = np.load(self.folder / f"{name}.npy")
        return places

    def publish(self, partial: Path, final: Path) -> None:
        """Put a domain that was made of it into its place, if it still holds.

        Raises:
            ShearingError: other domains have come.
        """
        with publishing(self.output):
            self.require()
            write_text(self.folder / f"{final.name}.sha256", sha256_of_file(partial / MANIFEST_NAME))
            publish(partial, final)

    def _known(self) -> dict[str, str]:
        """Asked for after what is `standing`: a domain's mark is there before it is, and others publish meanwhile."""
        path = self.folder / _KNOWN
        known = read_json(path)["domains"] if path.is_file() else {}  # none of earlier versions
        # By name and not by a listing, which on a shared disk may be older than what it lists.
        marks = {name: self.folder / f"{name}.sha256" for name in domains_of(self.output)}
        return known | {name: mark.read_text(encoding="utf-8") for name, mark in marks.items() if mark.is_file()}


def _save(path: Path, places: Places) -> None:
    with path.open("wb") as file:
        np.save(file, places)
        file.flush()
        os.fsync(file.fileno())
