"""Documents of nearly the same text, found by datatrove's MinHash over all shards of a preparation.

Signatures are made while a task reads its documents; then pairs are looked for in each bucket, and joined to clusters.
With datatrove's own settings (14 buckets of 8 hashes over runs of 5 words) texts that share 80 % of their runs are
found with a chance of 92 %, texts that share half of them with one of 5 %.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from data_tools.preparation.work_folder import WorkFolder

# Of its two hashes the one that works with every version of its package.
CONFIG = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
NUM_BUCKETS = CONFIG.num_buckets
_WORD = re.compile(r"\w+")


class Words(WordTokenizer):  # type: ignore[misc]
    """Runs of letters, digits and underscores; datatrove's own way is a package of hundreds of megabytes."""

    def word_tokenize(self, text: str) -> list[str]:
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


class Signatures(MinhashDedupSignature):  # type: ignore[misc]
    """Signatures of a task's documents, on disk before the task is marked as done."""

    def __init__(self, work: WorkFolder) -> None:
        super().__init__(str(work.near_duplicates / "signatures"), config=CONFIG, language=Words())
        self.folder = work.near_duplicates / "signatures"

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        for path in self.folder.glob(f"bucket_*/{rank:05d}.minhash.sig"):
            with path.open("rb") as file:
                os.fsync(file.fileno())


def find_pairs(work: WorkFolder) -> Any:
    """The step that finds pairs, for `NUM_BUCKETS` tasks."""
    folder = work.near_duplicates
    return MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=CONFIG)


def join_clusters(work: WorkFolder) -> Any:
    """The step that joins pairs to clusters, for one task."""
    folder = work.near_duplicates
    return MinhashDedupCluster(str(folder / "pairs"), str(folder / "clusters"), config=CONFIG, save_cluster_id=True)


def read_clusters(folder: Path, *, rank: int, documents: int) -> npt.NDArray[np.int64]:
    """Number of the cluster of each document of a shard, -1 for none; int64 [documents]."""
    clusters = np.full(documents, -1, dtype=np.int64)
    path = folder / "clusters" / f"{rank:06d}.clusters"
    if path.is_file():
        pairs = np.fromfile(path, dtype="<u4").reshape(-1, 2)
        clusters[pairs[:, 0]] = pairs[:, 1]
    return clusters
