"""Sample number i is a pure function of the seed and an append-only log of (first sample, weights).

Which domain: within a segment of the log a quota deals domains, no random draw. Every sample each domain's deficit
(samples due minus samples dealt) grows by its weight; of the domains with a positive deficit the one whose deficit
will first reach 1 is dealt. Under constant weights no domain is ever a whole sample off its exact share, which
"largest deficit first" does not guarantee. Deficits carry over from one segment to the next, so a domain that gets
less than one sample per segment is still dealt in time. A domain of weight 0 is never dealt, whatever it is owed.
Weights are counted in whole units of 2^-40 and sums are integers: nothing drifts, however long the run.

Deficits are whole numbers below 2^53, so float64 holds them exactly and arithmetic over all domains at once gives what
integers would give.

Which row: each domain is walked in a permutation of its rows keyed by (seed, domain, pass), computed and not stored.

Shapes: B sequences of a batch, S tokens of a sequence, n rows of a domain, D domains.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shearing.data.corpus.corpus import Corpus
from shearing.data.documents import DocumentRules
from shearing.data.splitmix64 import INCREMENT, Words, mixed
from shearing.errors import ShearingError, key

UNITS = 1 << 40
ROUND_CONSTANTS = tuple(np.uint64(INCREMENT * i % 2**64) for i in range(1, 7))
# Samples are dealt in stretches of this many, so that what a call of NumPy takes whatever its size is shared out.
STRETCH = 1024
# The last few stretches are kept whole, and positions every so many samples, which bounds the work of going back.
STRETCHES_KEPT = 8
SNAPSHOT_INTERVAL = 8192
# Domains from which on arithmetic over all of them at once is faster than a loop.
MANY_DOMAINS = 32
STATE_VERSION = 2

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of the sequence: tokens int64 [B, S + 1], domain_ids int64 [B] into `Mixture.domains`.

    Attributes:
        rows: int64 [B], of the domains.
        positions: int64 [B, S + 1], see `Corpus.row_positions`; None unless the mixture was asked for them.
        counted: bool [B, S + 1], tokens that count as labels; None: all.
        num_labels: labels that count in the whole step that this batch is part of; None: all of them.
    """

    tokens: Tensor
    domain_ids: Tensor
    rows: Tensor
    first_sample: int
    positions: Tensor | None = None
    counted: Tensor | None = None
    num_labels: int | None = None


@dataclass(frozen=True, eq=False)
class _Position:
    """The quota just before `sample`: deficits in units of 2^-40, samples dealt so far; both [D], never changed."""

    sample: int
    deficits: Floats
    dealt: Counts


@dataclass(frozen=True, eq=False)
class _Segment:
    """Weights that hold from `first_sample` on: as given, and in units of 2^-40; both [D]."""

    first_sample: int
    weights: Floats
    units: Floats


@dataclass(frozen=True, eq=False)
class _Stretch:
    """Samples dealt in one go, under one set of weights: the position before them; domain and row of each, [n]."""

    start: _Position
    units: Floats
    domain_ids: Counts
    rows: Counts

    @property
    def end(self) -> int:
        """One past its last sample."""
        return self.start.sample + len(self.domain_ids)

    def position(self, sample: int) -> _Position:
        """The quota just before a sample of the stretch, or its end."""
        count = sample - self.start.sample
        dealt = np.bincount(self.domain_ids[:count], minlength=len(self.units))
        deficits = self.start.deficits + count * self.units - UNITS * dealt.astype(np.float64)
        return _Position(sample, deficits, self.start.dealt + dealt)

    def until(self, sample: int) -> _Stretch:
        """The part of it before a sample."""
        count = sample - self.start.sample
        return _Stretch(self.start, self.units, self.domain_ids[:count], self.rows[:count])


def permuted(positions: npt.NDArray[np.int64], *, sizes: npt.NDArray[np.int64], keys: Words) -> npt.NDArray[np.int64]:
    """Image of each position under the permutation of range(size) that its key names.

    A balanced Feistel network over the next power of four, walked until it falls inside (Black and Rogaway 2002), so
    neither memory nor time depends on the size.

    Args:
        positions: int64 [B], each in range(size).
        sizes: int64 [B], at least 1.
        keys: uint64 [B].

    Returns:
        int64 [B].
    """
    # The exponent of a float is the bit length of an integer below 2^53, exactly, on every machine.
    bits = np.maximum(np.frexp((sizes - 1).astype(np.float64))[1], 1).astype(np.uint64)
    shifts = (bits + np.uint64(1)) // np.uint64(2)
    masks = (np.uint64(1) << shifts) - np.uint64(1)
    values = positions.astype(np.uint64)
    limits = sizes.astype(np.uint64)
    round_keys = [mixed(keys ^ constant) for constant in ROUND_CONSTANTS]
    walking = np.arange(len(values))
    while len(walking):
        shift, mask = shifts[walking], masks[walking]
        left, right = values[walking] >> shift, values[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mixed(right ^ round_key[walking]) & mask)
        values[walking] = left << shift | right
        walking = walking[values[walking] >= limits[walking]]
    return values.astype(np.int64)


def _in_units(weights: list[float]) -> Floats:
    """Weights as whole numbers that sum to exactly 2^40; a positive weight, however small, gets at least one."""
    total = sum(weights)
    units = [max(1, int(weight / total * UNITS)) if weight > 0 else 0 for weight in weights]
    units[units.index(max(units))] += UNITS - sum(units)
    return np.array(units, dtype=np.float64)


class Mixture:
    """The global sequence of samples of a run; ranks and workers take slices of it.

    Args:
        corpus: an open corpus; its domains in its order are what `domain_ids` index.
        seed: names the sequence, together with the weights.
        sequence_length: S, inputs per sample.
        weights: starting weights of every domain; they need not sum to 1.
        documents: what of documents the batches tell: nothing, or where they begin.

    Raises:
        ShearingError: a domain has no row of this length.
        ValueError: weights that are not one finite, not negative number per domain, or all zero.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        seed: int,
        sequence_length: int,
        weights: Mapping[str, float],
        documents: DocumentRules | None = None,
    ) -> None:
        self.corpus = corpus
        self.seed = seed
        self.sequence_length = sequence_length
        self.documents = (documents or DocumentRules()).heeding(corpus.bos)
        self.domains = corpus.domains
        rows = [corpus.train_rows(name, sequence_length=sequence_length) for name in self.domains]
        self._sizes = np.array(rows, dtype=np.int64)
        self._log = [self._segment(weights, first_sample=0)]
        size = len(self.domains)
        self._snapshots = [_Position(0, np.zeros(size), np.zeros(size, dtype=np.int64))]
        self._recent: deque[_Stretch] = deque(maxlen=STRETCHES_KEPT)
        self._next_sample = 0
        self._keys: dict[tuple[int, int], int] = {}

    @property
    def next_sample(self) -> int:
        """One past the last sample asked for so far."""
        return self._next_sample

    @property
    def weights(self) -> dict[str, float]:
        """The weights announced last, summing to 1."""
        return dict(zip(self.domains, self._log[-1].weights.tolist(), strict=True))

    def weights_at(self, sample: int) -> dict[str, float]:
        """The weights that a sample is dealt by; of samples since the run was resumed."""
        return dict(zip(self.domains, self._log[self._segment_at(sample)].weights.tolist(), strict=True))

    def update_weights(self, weights: Mapping[str, float], *, first_sample: int) -> None:
        """Announce weights that hold from `first_sample` on, in place of any announced for then or later.

        Raises:
            ValueError: samples from there on were already dealt.
        """
        if first_sample < self._next_sample:
            raise ValueError(f"weights from sample {first_sample} on, but samples up to {self._next_sample} were dealt")
        segment = self._segment(weights, first_sample=first_sample)
        self._log = [*(s for s in self._log if s.first_sample < first_sample), segment]
        # Samples from there on may have been dealt in advance under the old weights.
        self._snapshots = [s for s in self._snapshots if s.sample <= first_sample]
        kept = [s.until(first_sample) for s in self._recent if s.start.sample < first_sample]
        self._recent = deque(kept, maxlen=STRETCHES_KEPT)

    def batch(self, *, first_sample: int, num_sequences: int) -> Batch:
        """Samples first_sample … first_sample + num_sequences - 1; any slice at any time, forward is fast."""
        domain_ids, rows = self.dealt(first_sample=first_sample, num_sequences=num_sequences)
        chosen = [(self.domains[i], row) for i, row in zip(domain_ids.tolist(), rows.tolist(), strict=True)]
        tokens = self.corpus.rows(chosen, sequence_length=self.sequence_length)
        positions = None
        if self.documents.needs_positions:
            of_rows = [self.corpus.row_positions(*each, sequence_length=self.sequence_length) for each in chosen]
            positions = torch.from_numpy(np.stack(of_rows))
        counted = self.corpus.counted(chosen, sequence_length=self.sequence_length)
        self._next_sample = max(self._next_sample, first_sample + num_sequences)
        return Batch(
            torch.from_numpy(tokens),
            torch.from_numpy(domain_ids),
            torch.from_numpy(rows),
            first_sample,
            positions=positions,
            counted=None if counted is None else torch.from_numpy(counted),
        )

    def num_labels(self, *, first_sample: int, num_sequences: int) -> int | None:
        """Labels of these samples that count, where those that begin a document or lie outside of answers do not.

        None where all do. No token is read: every process knows the count of a whole step without asking the others.
        """
        if self.documents.loss_across and self.corpus.all_count:
            return None
        domain_ids, rows = self.dealt(first_sample=first_sample, num_sequences=num_sequences)
        left_out = sum(
            self.corpus.labels_left_out(
                self.domains[domain],
                rows[domain_ids == domain],
                sequence_length=self.sequence_length,
                loss_across=self.documents.loss_across,
            )
            for domain in np.unique(domain_ids).tolist()
        )
        return num_sequences * self.sequence_length - left_out

    def dealt(self, *, first_sample: int, num_sequences: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Domain and row of consecutive samples, both [B], under the weights announced so far; no token is read."""
        if first_sample < 0 or num_sequences < 1:
            raise ValueError(f"no samples {first_sample} + {num_sequences}")
        end = first_sample + num_sequences
        parts: list[tuple[Counts, Counts]] = []
        while (sample := first_sample + sum(len(rows) for _, rows in parts)) < end:
            stretch = self._stretch_at(sample)
            part = slice(sample - stretch.start.sample, end - stretch.start.sample)
            parts.append((stretch.domain_ids[part], stretch.rows[part]))
        domain_ids, rows = (np.concatenate(each) for each in zip(*parts, strict=True))
        return domain_ids, rows

    def samples_per_domain(self, *, next_sample: int | None = None) -> dict[str, int]:
        """Samples of each domain among those before `next_sample` (default: all asked for so far)."""
        position = self._position_at(self._next_sample if next_sample is None else next_sample)
        return dict(zip(self.domains, position.dealt.tolist(), strict=True))

    def passes(self, *, next_sample: int | None = None) -> dict[str, float]:
        """How many times each domain's rows were walked through before `next_sample`; 1.5 is one and a half."""
        dealt = self.samples_per_domain(next_sample=next_sample)
        return {name: dealt[name] / rows for name, rows in zip(self.domains, self._sizes.tolist(), strict=True)}

    def state_dict(self, *, next_sample: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps: the quota before `next_sample` (default: all asked for so far) and the weights then.

        JSON-able, the same whatever the number of ranks, and no longer after a long run than after a short one: of
        the log, the weights that hold at `next_sample` and those already announced for later; tens of kB for a
        thousand domains.
        """
        position = self._position_at(self._next_sample if next_sample is None else next_sample)
        log = self._log[self._segment_at(position.sample) :]
        return {
            "version": STATE_VERSION,
            "identity": self._identity(),
            "log": [[segment.first_sample, segment.weights.tolist()] for segment in log],
            "next_sample": position.sample,
            "deficits": [int(deficit) for deficit in position.deficits],
            "dealt": position.dealt.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; what lies before can then no more be asked for.

        Raises:
            ShearingError: the state is of another corpus, sequence length or seed.
        """
        if state.get("version") != STATE_VERSION:
            raise ShearingError(
                "mixture state", value=state.get("version"), allowed=f"version {STATE_VERSION}", mend="start a new run"
            )
        for name, mine in self._identity().items():
            if state["identity"][name] != mine:
                raise ShearingError(
                    f"mixture state: {name.replace('_', ' ')}",
                    value=mine,
                    allowed=f"{state['identity'][name]}, as when the checkpoint was written",
                    mend=f"set it back, or start a new run in another {key('folder')}",
                )
        self._log = [
            self._segment(dict(zip(self.domains, weights, strict=True)), first_sample=first)
            for first, weights in state["log"]
        ]
        position = _Position(
            state["next_sample"],
            np.array(state["deficits"], dtype=np.float64),
            np.array(state["dealt"], dtype=np.int64),
        )
        self._snapshots = [position]
        self._recent.clear()
        self._next_sample = position.sample

    def _identity(self) -> dict[str, object]:
        return {"corpus": self.corpus.fingerprint, "sequence_length": self.sequence_length, "seed": self.seed}

    def _segment(self, weights: Mapping[str, float], *, first_sample: int) -> _Segment:
        if set(weights) != set(self.domains):
            raise ValueError(f"weights of {sorted(weights)}, but the domains are {self.domains}")
        values = np.array([weights[name] for name in self.domains], dtype=np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
            raise ValueError(f"weights must be finite, not negative and not all zero: {dict(weights)}")
        # Kept as given, so that a state that went through JSON deals the very same units.
        return _Segment(first_sample, values, _in_units(values.tolist()))

    def _rows_at(self, domain_ids: Counts, walked: Counts) -> Counts:
        """Rows [n] of samples given by domain and by how many samples of it came before since the run began."""
        sizes = self._sizes[domain_ids]
        passes, positions = walked // sizes, walked % sizes
        walks, walk_of = np.unique(passes * len(self.domains) + domain_ids, return_inverse=True)
        keys = [self._key(walk % len(self.domains), walk // len(self.domains)) for walk in walks.tolist()]
        return permuted(positions, sizes=sizes, keys=np.array(keys, dtype=np.uint64)[walk_of])

    def _key(self, domain: int, walk: int) -> int:
        """Names the permutation of the walk-th pass over a domain."""
        if (domain, walk) not in self._keys:
            named = repr((self.seed, self.domains[domain], walk)).encode()
            self._keys[domain, walk] = int.from_bytes(hashlib.blake2b(named, digest_size=8).digest(), "big")
        return self._keys[domain, walk]

    def _position_at(self, sample: int) -> _Position:
        """The quota before any sample."""
        nearest = self._snapshot_before(sample)
        # The end of a stretch belongs to it: the samples behind it need not be dealt.
        return nearest if nearest.sample == sample else self._stretch_at(sample - 1).position(sample)

    def _snapshot_before(self, sample: int) -> _Position:
        before = bisect_right(self._snapshots, sample, key=lambda snapshot: snapshot.sample)
        if not before:
            first = self._snapshots[0].sample
            raise ValueError(f"sample {sample} lies before sample {first}, where the run was resumed")
        return self._snapshots[before - 1]

    def _segment_at(self, sample: int) -> int:
        """Index in the log of the weights that hold for a sample."""
        return bisect_right(self._log, sample, key=lambda segment: segment.first_sample) - 1

    def _stretch_at(self, sample: int) -> _Stretch:
        """The stretch that a sample is in, dealt if need be."""
        for stretch in reversed(self._recent):
            if stretch.start.sample <= sample < stretch.end:
                return stretch
        position = self._snapshot_before(sample)
        if self._recent and position.sample <= self._recent[-1].end <= sample:
            position = self._recent[-1].position(self._recent[-1].end)
        else:
            self._recent.clear()
        while position.sample <= sample:
            stretch = self._deal(position)
            self._recent.append(stretch)
            position = stretch.position(stretch.end)
            if position.sample % SNAPSHOT_INTERVAL == 0 and position.sample > self._snapshots[-1].sample:
                self._snapshots.append(position)
        return stretch

    def _deal(self, start: _Position) -> _Stretch:
        """The samples from a position on: up to the next multiple of STRETCH, or until the weights change."""
        index = self._segment_at(start.sample)
        end = (start.sample // STRETCH + 1) * STRETCH
        if index + 1 < len(self._log):
            end = min(end, self._log[index + 1].first_sample)
        units = self._log[index].units
        deal = _deal_many if len(units) >= MANY_DOMAINS else _deal_few
        domain_ids = deal(start.deficits, units=units, count=end - start.sample)
        rows = self._rows_at(domain_ids, start.dealt[domain_ids] + _occurrences_before(domain_ids))
        return _Stretch(start, units, domain_ids, rows)


def _deal_few(deficits: Floats, *, units: Floats, count: int) -> Counts:
    """Domains of the next samples under constant weights.

    Args:
        deficits: [D], before the first of them.
        units: [D], what each deficit grows by with every sample.

    Returns:
        int64 [count].
    """
    current, growth = deficits.tolist(), units.tolist()
    weighted = [domain for domain, unit in enumerate(growth) if unit]
    chosen = np.empty(count, dtype=np.int64)
    for i in range(count):
        first, soonest = -1, 0.0
        for domain in weighted:
            deficit = current[domain] = current[domain] + growth[domain]
            if deficit > 0:
                # Samples until the deficit is 1.
                due = (UNITS - deficit) / growth[domain]
                if first < 0 or due < soonest:
                    first, soonest = domain, due
        if first < 0:
            # All that is owed is owed to domains that have no weight any more.
            first = min(weighted, key=lambda domain: (UNITS - current[domain]) / growth[domain])
        current[first] -= UNITS
        chosen[i] = first
    return chosen


def _deal_many(deficits: Floats, *, units: Floats, count: int) -> Counts:
    """The same as `_deal_few`, all domains at once: 9 us a sample for a thousand, where the loop takes 250."""
    [weighted] = np.nonzero(units)
    current, growth = deficits[weighted], units[weighted]
    missing, due = np.empty_like(current), np.empty_like(current)
    not_due = np.empty(len(current), dtype=np.bool_)
    chosen = np.empty(count, dtype=np.int64)
    for i in range(count):
        np.add(current, growth, out=current)
        np.subtract(UNITS, current, out=missing)
        np.divide(missing, growth, out=due)
        np.greater_equal(missing, UNITS, out=not_due)
        np.putmask(due, not_due, np.inf)
        first = due.argmin()
        if not_due[first]:
            first = np.divide(missing, growth, out=due).argmin()
        current[first] -= UNITS
        chosen[i] = first
    dealt: Counts = weighted[chosen]
    return dealt


def _occurrences_before(values: Counts) -> Counts:
    """How many earlier elements equal each element; [n] -> [n]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.searchsorted(ordered, ordered, side="left")
    before = np.empty_like(values)
    before[order] = np.arange(len(values)) - first
    return before
