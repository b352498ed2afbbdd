"""Which split a document is in: chosen by a hash of its content, so that no text is in two of them, in any domain.

What is dealt to a side is a group: documents of one text, and with them, where near-duplicates were looked for, the
documents of their cluster. A group has a key, a number mixed from the hash of its text and the split seed. In each
domain the groups with the lowest keys are validation text until the wanted size is reached, then test text; one that
is over a quarter of the domain and over twice the size is passed over for those behind it. What is held out in one
domain is held out in all of them. Domains that were prepared earlier stand: their texts stay where they are. What a
seed holds out for validation does not depend on how much it holds out for the test.

What a domain holds out by its own keys does not depend on what others hold out of it, which comes on top: so one that
is lost and made again beside the others, with whom it was first made or after whom, is what it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from shearing.data.corpus.format import HELD_OUT, SPLITS, DomainManifest, HeldOutSplit, Split
from shearing.data.corpus.shards import Shard
from shearing.data.splitmix64 import INCREMENT, mixed
from shearing.errors import ShearingError
from shearing.settings.quantities import DIGITS, of_commas

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
Sides = npt.NDArray[np.uint8]

VALUES_AT_ONCE = 1 << 18
SIZE_FORMS = "a share of the tokens, as 5%, or a number of them, as 2M tokens"
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_TOKENS = re.compile(rf"({DIGITS}(?:\.\d+)?)\s*([KMB]?)\s*tokens")
_MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True)
class SplitSize:
    """How much of each domain is in a held-out split: a share of its tokens, in (0, 1), or a number of them."""

    share: Fraction | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> SplitSize:
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
        raise ValueError(f"{text!r} is no size: write {SIZE_FORMS}{of_commas(text)}")

    def __str__(self) -> str:
        if self.share is not None:
            percent = self.share * 100
            exact = Decimal(percent.numerator) / Decimal(percent.denominator)
            return f"{exact.normalize():f}%"
        return f"{self.tokens} tokens"

    def of(self, total: int) -> int:
        """Tokens of a domain that has `total`."""
        return math.ceil(total * self.share) if self.share is not None else self.tokens or 0


@dataclass(frozen=True)
class SplitSizes:
    """Sizes of the held-out splits of each domain.

    Raises:
        ValueError: shares that leave nothing to train on.
    """

    validation: SplitSize
    test: SplitSize

    def __post_init__(self) -> None:
        if sum(size.share or 0 for size in (self.validation, self.test)) >= 1:
            raise ValueError("shares below 100% together")

    def to_json(self) -> dict[str, str]:
        """By split, as they are read."""
        return {split: str(getattr(self, split)) for split in HELD_OUT}


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
    """Hashes of the texts in each split of the domains that are there already."""

    train: Hashes
    validation: Hashes
    test: Hashes

    @classmethod
    def none(cls) -> Earlier:
        return cls(**{split: np.empty(0, np.uint64) for split in SPLITS})

    def sides(self, hashes: Hashes) -> npt.NDArray[np.int8]:
        """Where texts are already: places in `format.SPLITS`, -1 for nowhere; the first one, of two."""
        found = np.full(len(hashes), -1, dtype=np.int8)
        for index, split in reversed(list(enumerate(SPLITS))):
            found[_is_among(hashes, np.sort(getattr(self, split)))] = index
        return found


def split_keys(hashes: Hashes, *, seed: int) -> Hashes:
    """Numbers by which groups are ordered: the finaliser of SplitMix64 over hash and seed.

    It is a bijection for each seed, so different hashes have different keys.
    """
    with np.errstate(over="ignore"):
        return mixed(hashes ^ mixed(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(INCREMENT)))


def choose_splits(
    domains: Mapping[str, Documents], *, sizes: SplitSizes, seed: int, earlier: Earlier | None = None
) -> dict[str, Sides]:
    """Which split each document of each domain is in; uint8 [documents], places in `format.SPLITS`.

    Args:
        sizes: of each domain's held-out splits; reached by whole groups, so more is held out: at most as much again,
            or up to a quarter of the domain more. Only where other groups do not suffice it may be less, or, where
            there are none, a larger one. Texts that other domains hold out, earlier ones too, come on top.
        seed: another one chooses other documents.
        earlier: texts that have their side already.

    Raises:
        ShearingError: a domain cannot have text in each split.
    """
    earlier = earlier or Earlier.none()
    keys = _group_keys(domains, seed=seed)
    stands = {name: earlier.sides(each.hashes) for name, each in domains.items()}
    # Groups with a text that is somewhere already go there; of two sides training wins, then validation.
    forced: dict[Split, Hashes] = {}
    for index, split in enumerate(SPLITS):
        found = _union(keys[name][stands[name] == index] for name in domains)
        forced[split] = np.setdiff1d(found, _union(forced.values()), assume_unique=True)
    chosen: dict[Split, Hashes] = {"train": forced["train"]}
    for index, split in enumerate(HELD_OUT):
        later = HELD_OUT[index + 1 :]
        barred = _union([*chosen.values(), *(forced[each] for each in later)])
        parts = [forced[split]]
        for name, documents in domains.items():
            # A group has to stay for each split that is still to come, unless one is there already.
            still: list[Split] = ["train", *later]
            waiting = [each for each in still if not _is_among(keys[name], forced[each]).any()]
            parts.append(
                _lowest(
                    keys[name],
                    documents.tokens,
                    target=_target(name, documents, sizes=sizes, split=split),
                    barred=barred,
                    forced=forced[split],
                    leave=len(waiting),
                    leave_small=len(later),
                )
            )
        chosen[split] = np.setdiff1d(_union(parts), barred, assume_unique=True)
    sides = {}
    for name in domains:
        side = np.zeros(len(keys[name]), dtype=np.uint8)
        for split in HELD_OUT:
            side[_is_among(keys[name], chosen[split])] = SPLITS.index(split)
        stood = stands[name] >= 0
        side[stood] = stands[name][stood]
        _require_all_splits(name, side, stood=bool(stood.any()))
        sides[name] = side
    return sides


def far_from_asked(manifest: DomainManifest) -> list[str]:
    """What is held out of a domain and is over twice, or below half, of what was asked for, in words."""
    found = []
    for part, size in manifest.sizes.items():
        held, asked = manifest.parts[part].tokens, SplitSize.parse(size).of(manifest.tokens)
        if not asked <= 2 * held <= 4 * asked:
            found.append(f"{part} has {held:,} of {manifest.tokens:,} tokens, where {asked:,} were asked for ({size})")
    return found


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


def _union(parts: Iterable[Hashes]) -> Hashes:
    return np.unique(np.concatenate([np.empty(0, np.uint64), *parts]))


def _target(name: str, documents: Documents, *, sizes: SplitSizes, split: HeldOutSplit) -> int:
    """How many tokens of a domain a split is to hold.

    Raises:
        ShearingError: all held-out splits together would leave nothing.
    """
    total = int(documents.tokens.sum())
    wanted: dict[str, int] = {each: getattr(sizes, each).of(total) for each in HELD_OUT}
    if sum(wanted.values()) >= total and any(getattr(sizes, each).tokens for each in HELD_OUT):
        raise ShearingError(
            " and ".join(HELD_OUT),
            value=" and ".join(str(getattr(sizes, each)) for each in HELD_OUT),
            allowed=f"less together than domain {name} has, {total} tokens",
            mend=f"hold out less, or a share as 5%, or give domain {name} more text",
        )
    return wanted[split]


def _lowest(
    keys: Hashes,
    tokens: npt.NDArray[np.int64],
    *,
    target: int,
    barred: Hashes,
    forced: Hashes,
    leave: int,
    leave_small: int,
) -> Hashes:
    """Keys of the groups that a domain itself holds out: as few as reach `target`, at least one.

    One long document must not take most of a domain out of training: groups over twice the target and over a quarter of
    the domain are passed over while there are others.

    Args:
        barred: groups that go elsewhere.
        forced: groups that are held out anyway: they count as if they were not, or less would be chosen beside a domain
            that holds out what this one did before it.
        leave: groups that stay, of those that go nowhere anyway.
        leave_small: of those that are not large, wherever they go: splits to come want such too.
    """
    total = int(tokens.sum())
    large = max(2 * target, total // 4)
    is_barred = _is_among(keys, barred)
    if is_barred.all():
        return np.empty(0, np.uint64)
    # Keys are as good as random: those below a share of their range hold about that share of the tokens. Only they are
    # sorted, and where they are too few, four times as many.
    looked_at = min(1.0, 1.5 * (target + int(tokens[is_barred].sum())) / total)
    while True:
        looked = keys <= np.uint64(int(looked_at * (2**64 - 1))) if looked_at < 1 else np.ones(len(keys), np.bool_)
        groups, inverse = np.unique(keys[looked], return_inverse=True)
        sizes = np.bincount(inverse.reshape(-1), weights=tokens[looked]).astype(np.int64)
        order = np.argsort(sizes > large, kind="stable")  # by keys, and then the large ones
        order = order[~_is_among(groups, barred)[order]]
        count = int(np.searchsorted(np.cumsum(sizes[order]), target)) + 1
        own = np.cumsum(~_is_among(groups[order], forced))
        most = int(np.searchsorted(own, own[-1:].sum() - leave, side="right"))
        small = int((sizes[order] <= large).sum())
        most = min(most, max(1, min(small, int((sizes <= large).sum()) - leave_small)))
        if looked_at >= 1 or count <= min(most, small):
            return groups[order[: min(count, most)]]
        looked_at = min(1.0, 4 * looked_at)


def _require_all_splits(name: str, sides: Sides, *, stood: bool) -> None:
    missing = [split for index, split in enumerate(SPLITS) if not (sides == index).any()]
    if not missing:
        return
    if stood:
        value = f"nothing for {' and '.join(missing)}: its texts are in other parts of domains prepared earlier"
        mend = "give it texts of its own, or prepare all domains in one command into a new folder"
    else:
        value = "too few different documents to have some in each split"
        mend = "give more files, or say how one file divides into documents"
    raise ShearingError(
        f"domain {name}",
        value=value,
        allowed=f"at least {len(SPLITS)} different documents, one for each of {', '.join(SPLITS)}",
        mend=mend,
    )
