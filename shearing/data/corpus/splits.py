"""Which documents are held out: chosen by a hash of their content, so that no text is on both sides, in any domain.

What is dealt to a side is a group: documents of one text, and with them, where near-duplicates were looked for, the
documents of their cluster. A group has a key, a number mixed from the hash of its text and the split seed. In each
domain the groups with the lowest keys are held out until the wanted size is reached; what is held out in one domain is
held out in all of them. Domains that were prepared earlier stand: their texts stay on the side where they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.shards import Shard
from shearing.data.splitmix64 import INCREMENT, mixed
from shearing.errors import ShearingError

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

VALUES_AT_ONCE = 1 << 18
HELDOUT_FORMS = "a share of the tokens, as 5%, or a number of them, as 2M tokens"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TOKENS = re.compile(r"(\d[\d_,]*(?:\.\d+)?)\s*([KMB]?)\s*tokens")
_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class HeldoutSize:
    """How much of each domain is held out: exactly one of a share of its tokens, in (0, 1), and a number of them."""

    share: Fraction | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> HeldoutSize:
        """Read "5%" or "2M tokens".

        Raises:
            ValueError: anything else, or a share that is not between 0 and 100 %.
        """
        if share := _SHARE.fullmatch(text.strip()):
            fraction = Fraction(share[1]) / 100
            if 0 < fraction < 1:
                return cls(share=fraction)
        elif count := _TOKENS.fullmatch(text.strip()):
            tokens = Fraction(re.sub("[_,]", "", count[1])) * _MULTIPLES[count[2]]
            if tokens >= 1 and tokens.denominator == 1:
                return cls(tokens=int(tokens))
        raise ValueError(f"{text!r} is no size: write {HELDOUT_FORMS}")

    def __str__(self) -> str:
        if self.share is not None:
            return f"{float(self.share * 100):g}%"
        return f"{self.tokens} tokens"


@dataclass(frozen=True)
class Documents:
    """The documents of a domain, in order.

    Args:
        hashes: `format.text_hash` of each; uint64 [documents].
        tokens: length of each, separator included; int64 [documents].
        clusters: number of the cluster of near-duplicates that each is in, the same numbers in all domains; -1: in
            none; int64 [documents]; None: not looked for.
    """

    hashes: Hashes
    tokens: npt.NDArray[np.int64]
    clusters: npt.NDArray[np.int64] | None = None

    @classmethod
    def of_shards(cls, shards: Sequence[Shard], *, clusters: npt.NDArray[np.int64] | None = None) -> Documents:
        """The documents of shards, one after the other; the only thing of a domain that is in memory as a whole."""
        total = sum(shard.documents for shard in shards)
        hashes, tokens = np.empty(total, np.uint64), np.empty(total, np.int64)
        first = 0
        for shard in shards:
            for part in shard.read_documents():
                hashes[first : first + len(part)] = part["hash"]
                tokens[first : first + len(part)] = part["tokens"]
                first += len(part)
        return cls(hashes=hashes, tokens=tokens, clusters=clusters)


@dataclass(frozen=True)
class Earlier:
    """Hashes of the texts on each side of the domains that are there already."""

    train: Hashes
    heldout: Hashes

    @classmethod
    def none(cls) -> Earlier:
        return cls(train=np.empty(0, np.uint64), heldout=np.empty(0, np.uint64))


def split_keys(hashes: Hashes, *, seed: int) -> Hashes:
    """Numbers by which groups are ordered: the finaliser of SplitMix64 over hash and seed.

    It is a bijection for each seed, so different hashes have different keys.
    """
    with np.errstate(over="ignore"):
        return mixed(hashes ^ mixed(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(INCREMENT)))


def choose_heldout(
    domains: Mapping[str, Documents], *, size: HeldoutSize, seed: int, earlier: Earlier | None = None
) -> dict[str, Mask]:
    """Which documents of each domain are held out; bool [documents].

    Args:
        size: of each domain's held-out part; reached by whole groups, so a little more is held out. Texts that other
            domains hold out come on top.
        seed: another one chooses other documents.
        earlier: texts that have their side already.

    Raises:
        ShearingError: a domain cannot have text on both sides.
    """
    earlier = earlier or Earlier.none()
    keys = _group_keys(domains, seed=seed)
    trained, held = np.sort(earlier.train), np.sort(earlier.heldout)
    in_train = {name: _is_among(each.hashes, trained) for name, each in domains.items()}
    in_heldout = {name: _is_among(each.hashes, held) for name, each in domains.items()}
    # A group with a text in an earlier training part cannot be held out; one with an earlier held-out text must be.
    barred = _union(keys[name][in_train[name]] for name in domains)
    forced = _union(keys[name][in_heldout[name]] for name in domains)
    chosen = [forced]
    for name, documents in domains.items():
        chosen.append(_lowest(name, keys[name], documents.tokens, size=size, barred=barred, forced=forced))
    everywhere = np.setdiff1d(_union(iter(chosen)), barred, assume_unique=True)
    sides = {}
    for name in domains:
        heldout = _is_among(keys[name], everywhere)
        sides[name] = (heldout | in_heldout[name]) & ~in_train[name]
        _require_both_sides(name, sides[name], earlier=earlier)
    return sides


def first_of_each(values: npt.NDArray[Any]) -> Mask:
    """Where each value occurs for the first time."""
    first = np.zeros(len(values), dtype=np.bool_)
    first[np.unique(values, return_index=True)[1]] = True
    return first


def _group_keys(domains: Mapping[str, Documents], *, seed: int) -> dict[str, Hashes]:
    """The key of each document's group: of a cluster, the lowest key of its texts."""
    keys = {name: split_keys(each.hashes, seed=seed) for name, each in domains.items()}
    largest = max(
        (int(c.max()) for each in domains.values() if (c := each.clusters) is not None and len(c)), default=-1
    )
    lowest = np.full(largest + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    for name, each in domains.items():
        if each.clusters is not None:
            inside = each.clusters >= 0
            np.minimum.at(lowest, each.clusters[inside], keys[name][inside])
    for name, each in domains.items():
        if each.clusters is not None:
            inside = each.clusters >= 0
            keys[name][inside] = lowest[each.clusters[inside]]
    return keys


def _is_among(values: Hashes, ascending: Hashes) -> Mask:
    """Where a value is one of sorted ones; unlike `numpy.isin` it needs no memory but the answer's."""
    among = np.zeros(len(values), dtype=np.bool_)
    if len(ascending):
        for start in range(0, len(values), VALUES_AT_ONCE):
            part = values[start : start + VALUES_AT_ONCE]
            places = np.minimum(np.searchsorted(ascending, part), len(ascending) - 1)
            among[start : start + VALUES_AT_ONCE] = ascending[places] == part
    return among


def _union(parts: Any) -> Hashes:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _lowest(
    name: str,
    keys: Hashes,
    tokens: npt.NDArray[np.int64],
    *,
    size: HeldoutSize,
    barred: Hashes,
    forced: Hashes,
) -> Hashes:
    """Keys of the groups that the domain itself holds out: as few as reach the size, at least one, never all."""
    total = int(tokens.sum())
    if size.tokens is not None and size.tokens >= total:
        raise ShearingError(
            "heldout",
            value=str(size),
            allowed=f"less than domain {name} has, {total} tokens",
            mend=f"hold out less, or a share as 5%, or give domain {name} more text",
        )
    target = math.ceil(total * size.share) if size.share is not None else size.tokens or 0
    is_forced, is_barred = _is_among(keys, forced), _is_among(keys, barred)
    target -= int(tokens[is_forced].sum())
    free = ~(is_forced | is_barred)
    if target <= 0 or not free.any():
        return np.empty(0, np.uint64)
    # Keys are as good as random: those below a share of their range hold about that share of the tokens. Only they are
    # sorted, and where they are too few, four times as many.
    looked_at = min(1.0, 1.5 * target / total)
    while True:
        looked = free & (keys <= np.uint64(int(looked_at * (2**64 - 1)))) if looked_at < 1 else free
        groups, inverse = np.unique(keys[looked], return_inverse=True)
        reached = np.cumsum(np.bincount(inverse.reshape(-1), weights=tokens[looked]).astype(np.int64))
        count = int(np.searchsorted(reached, target)) + 1
        if looked_at >= 1:
            # One group has to stay for training, unless some are there that cannot be held out.
            return groups[: min(count, len(groups) - (0 if is_barred.any() else 1))]
        if count <= len(groups) and looked.sum() < free.sum():
            return groups[:count]
        looked_at = min(1.0, 4 * looked_at)


def _require_both_sides(name: str, heldout: Mask, *, earlier: Earlier) -> None:
    if heldout.any() and not heldout.all():
        return
    side = "held-out" if heldout.all() else "training"
    if len(earlier.train):
        value = f"only texts that are in the {side} part of a domain prepared earlier"
        mend = "give it texts of its own, or prepare all domains in one command into a new folder"
    else:
        value = "too few different documents to have some on both sides"
        mend = "give more files, or say how one file divides into documents"
    raise ShearingError(
        f"domain {name}", value=value, allowed="at least two different documents, one to hold out", mend=mend
    )
