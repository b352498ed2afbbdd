"""A corpus of which some tokens do not count, made of one of which all do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from shearing.data.corpus.corpus import Corpus
from shearing.data.corpus.counted import BitsWriter, counted_path


def with_answers(corpus: Path, copy: Path, *, domain: str, share: float = 0.4) -> Path:
    """A copy in which of a domain runs of up to 9 tokens count: about this share of training text, 0.4 of the rest."""
    shutil.copytree(corpus, copy)
    path = copy / domain / "manifest.json"
    manifest = json.loads(path.read_text())
    for part, counts in manifest["parts"].items():
        draw = np.random.default_rng(len(part))
        often = share if part == "train" else 0.4
        bits = np.repeat(draw.random(counts["tokens"]) < often, draw.integers(1, 10, counts["tokens"]))
        writer = BitsWriter(counted_path(copy / domain, part))
        for piece in np.split(bits[: counts["tokens"]], sorted(draw.integers(0, counts["tokens"], 9))):
            writer.write(piece)
        counts["counted"], counts["counted_sha256"] = writer.count, writer.close()
    path.write_text(json.dumps(manifest))
    Corpus.open(copy)
    return copy


def with_beginnings(corpus: Path, copy: Path) -> Path:
    """A copy whose documents begin with a token that counts in no loss: it says so of the first of each."""
    shutil.copytree(corpus, copy)
    for path in copy.glob("*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_mode": "document", "bos_id": 0}))
    return copy
