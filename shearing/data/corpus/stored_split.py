"""Where the documents of a split lie: in a part of its own, or, of format 2, in a half of the one held-out part.

Format 2 held out one part of a domain for all purposes. Its documents are divided where one ends nearest to the middle
of its tokens: those before steer, those behind judge. So both read the same documents every time and share none, though
a text that the part holds twice may be on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.counted import Counted, counted_path
from shearing.data.corpus.format import ONE_PART, DomainManifest, Split
from shearing.data.corpus.integrity import open_tokens
from shearing.data.corpus.tokens import PieceOfTokens, Tokens
from shearing.files.mapped_arrays import map_array


@dataclass(frozen=True)
class StoredSplit:
    """Documents and tokens of a part of a domain that are a split.

    Args:
        folder: of the domain.
        manifest: of the domain.
        part: whose files hold them.
        documents: first one, and one behind the last.
        tokens: the same of its tokens.
    """

    folder: Path
    manifest: DomainManifest
    part: str
    documents: tuple[int, int]
    tokens: tuple[int, int]

    @classmethod
    def find(cls, folder: Path, *, split: Split, manifest: DomainManifest) -> StoredSplit:
        """The split of the domain in `folder`.

        Raises:
            OSError: of format 2, the file of document ends cannot be opened.
        """
        if split in manifest.parts:
            counts = manifest.parts[split]
            return cls(folder, manifest, split, (0, counts.documents), (0, counts.tokens))
        ends = map_array(folder / f"{ONE_PART}_ends.npy")
        total = int(ends[-1]) if len(ends) else 0
        behind = int(np.searchsorted(ends, total / 2))
        candidates = [(abs(int(ends[i]) - total / 2), i + 1) for i in (behind - 1, behind) if 0 <= i < len(ends) - 1]
        middle = min(candidates)[1] if candidates else 0
        middle_token = int(ends[middle - 1]) if middle else 0
        if split == "validation":
            return cls(folder, manifest, ONE_PART, (0, middle), (0, middle_token))
        return cls(folder, manifest, ONE_PART, (middle, len(ends)), (middle_token, total))

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return self.tokens[1] - self.tokens[0]

    def open_tokens(self) -> Tokens:
        """All its tokens.

        Raises:
            OSError, ShearingError: a file cannot be opened.
        """
        whole = open_tokens(self.folder, part=self.part, manifest=self.manifest)
        if self.num_tokens == len(whole):
            return whole
        return PieceOfTokens(whole, first=self.tokens[0], length=self.num_tokens)

    def counted(self) -> Counted | None:
        """Which of its tokens count in a loss; None: all.

        Raises:
            OSError: the file cannot be opened.
        """
        # Corpora of format 2, whose parts are divided, have no such file.
        if self.manifest.parts[self.part].counted is None:
            return None
        return Counted(counted_path(self.folder, self.part))

    def document_ends(self) -> npt.NDArray[np.int64]:
        """Where each document ends in its tokens; int64 [documents], memory-mapped where nothing lies before it."""
        ends = map_array(self.folder / f"{self.part}_ends.npy")[slice(*self.documents)]
        return ends - self.tokens[0] if self.tokens[0] else ends

    def hashes(self) -> npt.NDArray[np.uint64]:
        """`text_hash` of each document; uint64 [documents], memory-mapped."""
        return map_array(self.folder / f"{self.part}_hashes.npy")[slice(*self.documents)]
